"use strict";

// The page of one visitor. The room is in the address (#kitchen); name and id are kept in this window.
const SILENT_ROLL_CALLS = 2; // who does not answer this many roll calls is gone
const ROLL_CALL_INTERVAL_MS = 20000;
const LINES_MAX = 500; // older lines leave the page
const element = (id) => document.getElementById(id);
const somebody = ["Ada", "Alan", "Barbara", "Edsger", "Grace", "John", "Katherine", "Margaret", "Radia", "Tim"];

const id = sessionStorage.id ||= crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);
let name = sessionStorage.name || localStorage.name || somebody[Math.floor(Math.random() * somebody.length)];
let room;
let socket;
let attempts = 0;
let reconnectTimer;
let people = new Map(); // id -> {name, connection, missed}: missed roll calls since the last sign of life

function roomOfAddress() {
  const wanted = decodeURIComponent(location.hash.slice(1)).toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return wanted.slice(0, 40) || "lobby";
}

function connect() {
  clearTimeout(reconnectTimer);
  if (socket) { socket.onclose = null; socket.close(1000); }
  showState("connecting");
  const base = new URL(`rooms/${room}?${new URLSearchParams({ name, id })}`, location.href.split("#")[0]);
  base.protocol = base.protocol.replace("http", "ws");
  const mine = socket = new WebSocket(base);
  mine.onopen = () => { attempts = 0; showState("open"); };
  mine.onmessage = (event) => received(JSON.parse(event.data));
  mine.onclose = () => {
    showState("connecting");
    // At once the first time, then later and later, each window at its own moment.
    const delay = attempts === 0 ? 50 : Math.min(10000, 300 * 2 ** attempts) * (0.5 + Math.random());
    attempts += 1;
    reconnectTimer = setTimeout(connect, delay);
  };
}

function received(message) {
  const known = people.has(message.id);
  if (message.kind === "said") {
    addLine(message);
  } else if (message.kind === "left") {
    // Somebody who has come back since, under another name perhaps, is still here.
    if (!known || people.get(message.id).connection !== message.connection) return;
    people.delete(message.id);
    if (message.id !== id) addNote(`${message.name} left`);
  } else {
    people.set(message.id, { name: message.name, connection: message.connection, missed: 0 });
    if (message.kind === "joined" && !known && message.id !== id) addNote(`${message.name} came in`);
  }
  showPeople();
}

function callTheRoll() {
  if (socket.readyState !== WebSocket.OPEN) return;
  for (const [key, person] of people) {
    person.missed += 1;
    if (person.missed > SILENT_ROLL_CALLS) people.delete(key);
  }
  showPeople();
  socket.send(JSON.stringify({ kind: "who" }));
}

function addLine(message) {
  const line = document.createElement("p");
  line.className = message.id === id ? "line mine" : "line";
  const now = new Date();
  const time = Object.assign(document.createElement("time"), {
    dateTime: now.toISOString(), textContent: now.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }),
  });
  line.append(time, Object.assign(document.createElement("b"), { textContent: message.name }), message.text);
  append(line);
}

function addNote(text) {
  append(Object.assign(document.createElement("p"), { className: "note", textContent: text }));
}

function append(line) {
  const said = element("said");
  const atEnd = said.scrollHeight - said.scrollTop - said.clientHeight < 60;
  said.append(line);
  while (said.children.length > LINES_MAX) said.firstChild.remove();
  if (atEnd) said.scrollTop = said.scrollHeight;
}

function showPeople() {
  const sorted = [...people].sort((a, b) => a[1].name.localeCompare(b[1].name));
  element("people").replaceChildren(...sorted.map(([key, person]) =>
    Object.assign(document.createElement("li"), { textContent: person.name, className: key === id ? "me" : "" })));
  element("count").textContent = people.size || "";
}

function showState(state) {
  element("state").dataset.state = state;
  element("state").textContent = state === "open" ? "connected" : "connecting …";
}

function enterRoom() {
  room = roomOfAddress();
  element("room").textContent = room;
  document.title = `#${room}`;
  element("said").replaceChildren();
  people = new Map();
  showPeople();
  attempts = 0;
  connect();
}

element("say").onsubmit = (event) => {
  event.preventDefault();
  const text = element("text").value.trim();
  if (!text || socket.readyState !== WebSocket.OPEN) return;
  socket.send(JSON.stringify({ kind: "say", text }));
  element("text").value = "";
};
element("go").onsubmit = (event) => {
  event.preventDefault();
  location.hash = element("other-room").value;
  element("other-room").value = "";
};
element("name").value = name;
element("name").onchange = () => {
  name = element("name").value.trim() || name;
  element("name").value = name;
  sessionStorage.name = localStorage.name = name;
  connect();
};
sessionStorage.name = name;
addEventListener("hashchange", enterRoom);
setInterval(callTheRoll, ROLL_CALL_INTERVAL_MS);
enterRoom();
