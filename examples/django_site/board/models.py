from django.conf import settings
from django.db import models


class Notice(models.Model):
    """What somebody pinned up, perhaps with a file."""

    author = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    text = models.CharField(max_length=500)
    file = models.FileField(blank=True)
    pinned_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self):
        return self.text
