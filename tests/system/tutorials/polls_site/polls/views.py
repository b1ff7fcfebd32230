from django.contrib import messages
from django.db.models import F
from django.http import HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.utils import timezone
from django.views import generic

from polls.models import Choice, Question


class IndexView(generic.ListView):
    template_name = "polls/index.html"
    context_object_name = "latest"

    def get_queryset(self):
        return Question.objects.filter(published__lte=timezone.now()).order_by("-published")[:5]


class DetailView(generic.DetailView):
    model = Question
    template_name = "polls/detail.html"

    def get_queryset(self):
        return Question.objects.filter(published__lte=timezone.now())


class ResultsView(generic.DetailView):
    model = Question
    template_name = "polls/results.html"


def vote(request, number):
    question = get_object_or_404(Question, pk=number)
    try:
        chosen = question.choice_set.get(pk=request.POST["choice"])
    except (KeyError, Choice.DoesNotExist):
        return render(request, "polls/detail.html", {"question": question, "error": "You chose nothing."})
    chosen.votes = F("votes") + 1
    chosen.save()
    messages.success(request, "Your vote counts.")
    return HttpResponseRedirect(reverse("polls:results", args=(question.id,)))
