"""The settings a Django project needs to answer HTTP requests, and no more."""

from __future__ import annotations

import os
import secrets

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or secrets.token_urlsafe()
DEBUG = False
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "examples.django_app.views"
MIDDLEWARE = ["examples.django_app.middleware.UpstreamMiddleware"]
DATA_UPLOAD_MAX_MEMORY_SIZE = 32 * 2**20
USE_TZ = True
