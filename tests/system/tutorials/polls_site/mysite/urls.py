from django.contrib import admin
from django.contrib.staticfiles.urls import staticfiles_urlpatterns
from django.urls import include, path

# The last line is what Django's documentation has for servers other than its own runserver.
urlpatterns = [
    path("polls/", include("polls.urls")),
    path("admin/", admin.site.urls),
    *staticfiles_urlpatterns(),
]
