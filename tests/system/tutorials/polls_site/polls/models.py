import datetime

from django.contrib import admin
from django.db import models
from django.utils import timezone


class Question(models.Model):
    text = models.CharField(max_length=200)
    published = models.DateTimeField("date published")

    def __str__(self):
        return self.text

    @admin.display(boolean=True, ordering="published", description="Recently?")
    def is_recent(self):
        return timezone.now() - datetime.timedelta(days=1) <= self.published <= timezone.now()


class Choice(models.Model):
    question = models.ForeignKey(Question, on_delete=models.CASCADE)
    text = models.CharField(max_length=200)
    votes = models.IntegerField(default=0)

    def __str__(self):
        return self.text
