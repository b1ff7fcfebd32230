"""A Django project on Trunkline: a notice board whose visitors see new notices at once.

    pip install ".[all]" "channels>=4.2" "django>=5.0" "whitenoise>=6.7"
    cd examples/django_site
    python manage.py migrate
    python manage.py createsuperuser
    trunkline serve project.asgi:application --workers 2

Then open http://127.0.0.1:8000/ in two windows, log in, and pin a notice up.

What there is to see, and where:

    project/settings.py      the one line for the channel layer; nothing else knows of Trunkline
    project/asgi.py          HTTP to Django, WebSockets to consumers, with sessions and users
    board/views.py           sync and async views, forms, ORM, sessions, login, uploads, streaming
    board/consumers.py       sync, async and JSON consumers, groups, scope["user"], database access, background work

Static files are WhiteNoise's. Data (SQLite, uploads) is in ./data, or in the directory that BOARD_DATA names. With
several workers they share the SQLite file; a busy site takes PostgreSQL. Reports are written by a worker of their
own, beside the others: ``trunkline worker project.asgi:application --redis … --channel reports``. The same views
without WebSockets, in threads: ``trunkline serve project.wsgi:application --interface wsgi``.
"""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
