// A click on a face shows a larger picture, next to the people whom the face may show. If others are
// selected, it selects the face. Words in the search field hide all people and films that match
// fewer words than others. Changes are sent without a new page.
const all = (selector, part = document) => [...part.querySelectorAll(selector)];
const boxes = () => all("[form=selection][type=checkbox]").filter((box) => box.checkVisibility());
const chosen = () => all("[form=selection]:checked");
const holder = (element) => element.closest(".grid li, .person, .doubt, .said"); // what a change hides
let last = null; // the box of which a range begins

function count() {
  const form = document.querySelector("#selection"), number = chosen().length;
  if (!form) return;
  const [one, ...rest] = form.dataset.what.split(" ");
  const many = one === "face" ? "faces" : "people";
  form.querySelector("#count").textContent =
    `${number} ${number === 1 ? one : many}${rest.length ? " " + rest.join(" ") : ""} selected`;
  const join = form.querySelector("[value=join]");
  if (join) join.hidden = number < 2;
}

function select(box, range) {
  const list = boxes(), from = list.indexOf(last), to = list.indexOf(box);
  if (range && from >= 0)
    for (const other of list.slice(Math.min(from, to), Math.max(from, to) + 1))
      other.checked = box.checked;
  last = box;
  count();
}

function move(box, key) {
  const list = boxes(), place = list.indexOf(box);
  const left = (other) => other.getBoundingClientRect().left;
  const below = (other) => Math.abs(left(other) - left(box)) < 9;
  const found = {
    ArrowRight: list[place + 1],
    ArrowLeft: list[place - 1],
    ArrowDown: list.slice(place + 1).find(below),
    ArrowUp: list.slice(0, Math.max(place, 0)).findLast(below),
  }[key];
  found?.focus();
}

// The larger picture.
const large = () => document.querySelector("#large");
let shown = [], place = 0;
function show(step) {
  place = (place + step + shown.length) % shown.length;
  const frame = large().querySelector(".frame > div"), box = frame.querySelector("i");
  if (!frame.querySelector("img")) frame.prepend(new Image());
  const image = frame.querySelector("img");
  const [left, top, width, height] = (shown[place].dataset.box ?? "").split(" ");
  for (const [name, share] of Object.entries({ left, top, width, height })) box.style[name] = `${share}%`;
  const about = holder(shown[place])?.querySelector(".grid p, h3 bdi, .doubt > p")?.innerText || "";
  const others = all(".guess", holder(shown[place]) ?? frame).map((guess) => guess.cloneNode(true));
  for (const button of others.flatMap((guess) => all("button", guess))) button.remove();
  large().querySelector(".others").replaceChildren(...others);
  const small = shown[place].querySelector("img")?.src;
  image.onload = () => (box.hidden = !width || image.src === small);
  image.onerror = () => small && image.src !== small && (image.src = small); // the film is missing
  box.hidden = true;
  for (const button of all("[value]", large())) button.hidden = shown.length < 2;
  image.src = shown[place].href;
  image.alt = shown[place].title;
  large().querySelector(".frame + p").textContent =
    `${about.includes(image.alt) ? about : `${about} ${image.alt}`} (${place + 1} of ${shown.length})`;
}

document.addEventListener("click", (event) => {
  const target = event.target;
  const link = target.closest(":is(.bar, .times a, .grid p a)[href*='t=']");
  if (link) link.target = "film";
  if (target.matches("[form=selection][type=checkbox]")) select(target, event.shiftKey);
  const face = target.closest("a.face");
  if (face && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    const box = holder(face)?.querySelector("[form=selection]");
    if (box && (chosen().length || event.shiftKey)) {
      box.checked = event.shiftKey || !box.checked;
      return select(box, event.shiftKey);
    }
    shown = all("a.face", face.closest(".grid, .faces"));
    place = shown.indexOf(face);
    show(0);
    large().showModal();
  }
  if (target.matches("#large [value]")) show(Number(target.value));
});
document.addEventListener("reset", () => setTimeout(count));
document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (large().open) {
    if (key === "ArrowRight" || key === "ArrowLeft") show(key === "ArrowRight" ? 1 : -1);
  } else if (key === "Escape" && chosen().length) {
    document.querySelector("#selection").reset();
    last?.focus();
  } else if (target.matches?.("[form=selection][type=checkbox]")) {
    if (key === "Enter") {
      if (!chosen().length) target.click();
      document.querySelector("#selection [name=person]").focus();
    } else if (key.startsWith("Arrow")) move(target, key);
    else return;
    event.preventDefault();
  }
});

// Sends the changes one after another. The changed people disappear at once.
let sent = Promise.resolve(), waiting = 0, version = null; // of the last answer
function replace(text, next) {
  const page = new DOMParser().parseFromString(text, "text/html");
  const field = document.activeElement;
  const typed = field?.name === "person" && field.value ? [field.ariaLabel, field.value] : null;
  const words = document.querySelector("#find input")?.value;
  document.title = page.title;
  for (const name of ["header", "nav", "main"]) {
    const old = document.querySelector(name), now = page.querySelector(name);
    old && now ? old.replaceWith(now) : old?.remove();
  }
  const find = document.querySelector("#find input");
  if (find && words !== find.value) {
    find.value = words;
    find.dispatchEvent(new Event("input", { bubbles: true }));
  }
  const again = typed && all("[name=person]").find((other) => other.ariaLabel === typed[0]);
  if (again) again.value = typed[1];
  const asked = again?.matches("[aria-describedby]") && document.querySelector(".said [autofocus]");
  const wanted = asked || again || document.querySelector("[autofocus]");
  (wanted || boxes().find((box) => box.value === next) || document.querySelector("main")).focus();
}
async function send(form, data) {
  data.set("version", version ?? data.get("version"));
  const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(data) });
  const text = await answer.text();
  waiting -= 1;
  version = text.match(/name="version" value="([0-9]+)"/)?.[1];
  if (!version) return location.reload(); // an answer without forms
  history.replaceState(null, "", answer.redirected ? answer.url : location.href);
  if (!waiting || !answer.ok) replace(text, data.get("next"));
}
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post") return;
  event.preventDefault();
  const data = new FormData(form, event.submitter), of = data.getAll("of");
  const words = event.submitter?.textContent;
  const about = words === "Save" ? data.getAll("person").at(-1) : words;
  const list = boxes(), changed = list.filter((box) => of.includes(box.value));
  if (form.id === "selection" && changed.length) {
    const after = list[list.indexOf(changed.at(-1)) + 1], before = list[list.indexOf(changed[0]) - 1];
    data.set("next", (after ?? before ?? changed[0]).value);
  }
  const next = list.find((box) => box.value === data.get("next"));
  for (const box of changed) holder(box).hidden = true;
  let said = document.querySelector(".said");
  if (!said) document.querySelector("main").prepend((said = document.createElement("div")));
  said.className = "said";
  said.innerHTML = "<p role=status></p>";
  said.firstChild.textContent = `Saving: ${about}`;
  if (form.id === "selection") form.reset();
  if (next) (holder(next).querySelector("[name=person]") ?? next).focus();
  waiting += 1;
  sent = sent.then(() => send(form, data)).catch(() => {
    said.firstChild.textContent = "Nothing was saved: vidjax has ended. Type vidjax review FOLDER.";
    waiting = 0;
  });
});

const plain = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
document.querySelector("#find")?.removeAttribute("hidden");
document.addEventListener("input", (event) => {
  const find = event.target.closest("#find");
  if (!find) return;
  const wanted = plain(event.target.value).split(/\s+/).filter(Boolean);
  const matched = (text) => wanted.filter((word) => plain(text).includes(word)).length;
  const kind = (part) => part.closest("#films, #doubtful, #people, #times").id;
  const best = new Map(), parts = all("[data-find]").map((part) => {
    const lines = all(".line", part), names = lines.map((line) => line.firstElementChild.textContent);
    const number = matched([part.dataset.find, ...names].join(" "));
    best.set(kind(part), Math.max(number, best.get(kind(part)) || 0));
    const any = names.some(matched);
    lines.forEach((line, place) => (line.hidden = any && !matched(names[place])));
    return [part, number];
  });
  let total = 0;
  for (const [part, number] of parts) {
    part.hidden = wanted.length > 0 && (!number || number < best.get(kind(part)));
    total += !part.hidden;
  }
  find.querySelector("[role=status]").textContent = !wanted.length ? "" : total ? `${total} match` : "Nothing matches.";
});
