from board import views
from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

urlpatterns = [
    path("", views.board, name="board"),
    path("pin", views.pin, name="pin"),
    path("notices.json", views.notices_json, name="notices-json"),
    path("notices.csv", views.notices_csv, name="notices-csv"),
    path("files/<int:number>", views.download, name="download"),
    path("login", LoginView.as_view(template_name="board/login.html"), name="login"),
    path("logout", LogoutView.as_view(), name="logout"),
]
