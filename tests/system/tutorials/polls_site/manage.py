"""A project of polls in the shape of Django's tutorial. Served by test_tutorials.py under ASGI and WSGI."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
