// New notices appear at the top while the page is open.
const list = document.getElementById("notices");

function listen() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws/board`);
  socket.onmessage = (message) => {
    const notice = JSON.parse(message.data);
    if (!("id" in notice)) return;
    const item = document.createElement("li");
    const author = document.createElement("b");
    author.textContent = notice.author;
    item.append(author, ` ${notice.text}`);
    list.prepend(item);
  };
  socket.onclose = () => setTimeout(listen, 1000);
}

listen();
