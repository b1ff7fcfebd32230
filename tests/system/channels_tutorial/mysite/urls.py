from chat import views
from django.urls import path

urlpatterns = [
    path("chat/<str:room_name>/", views.room, name="room"),
    path("say/<str:room_name>/", views.say, name="say"),
    path("say-async/<str:room_name>/", views.say_async, name="say-async"),
]
