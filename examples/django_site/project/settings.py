"""Settings of the notice board. Only CHANNEL_LAYERS has to do with Trunkline."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(os.environ.get("BOARD_DATA", BASE_DIR / "data"))
DATA_DIR.mkdir(parents=True, exist_ok=True)

SECRET_KEY = os.environ.get("BOARD_SECRET_KEY", "an example: not secret at all")
DEBUG = os.environ.get("BOARD_DEBUG") == "1"
ALLOWED_HOSTS = os.environ.get("BOARD_HOSTS", "localhost,127.0.0.1,[::1]").split(",")

# Without hosts it is the worker's own layer; elsewhere (manage.py shell, cron) the one that TRUNKLINE_REDIS names.
CHANNEL_LAYERS = {"default": {"BACKEND": "channel_layer.RedisChannelLayer"}}

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "board",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
ROOT_URLCONF = "project.urls"
ASGI_APPLICATION = "project.asgi.application"
WSGI_APPLICATION = "project.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": DATA_DIR / "board.sqlite3",
        "OPTIONS": {"timeout": 20},  # workers take turns at writing
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "board"
LOGOUT_REDIRECT_URL = "board"

STATIC_URL = "static/"
WHITENOISE_USE_FINDERS = True  # no collectstatic before the first start
MEDIA_ROOT = DATA_DIR / "uploads"
