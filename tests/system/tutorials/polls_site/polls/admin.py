from django.contrib import admin

from polls.models import Choice, Question


class ChoiceInline(admin.TabularInline):
    model = Choice
    extra = 2


@admin.register(Question)
class QuestionAdmin(admin.ModelAdmin):
    fieldsets = ((None, {"fields": ("text",)}), ("Date", {"fields": ("published",), "classes": ("collapse",)}))
    inlines = (ChoiceInline,)
    list_display = ("text", "published", "is_recent")
    list_filter = ("published",)
    search_fields = ("text",)
