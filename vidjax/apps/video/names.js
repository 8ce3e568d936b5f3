// A click on a bar of a timeline plays the film at this time. Words in the search field hide all
// people and films that do not contain the words.
document.addEventListener("click", (event) => {
  const bar = event.target.closest(".track i");
  if (bar) {
    const place = [...bar.parentElement.children].indexOf(bar);
    bar.closest(".line").querySelectorAll(".times li")[place].querySelector("a").click();
  }
  const link = event.target.closest(".times a[href*='t=']");
  if (link) link.target = "film";
});
const plain = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
const find = document.querySelector("#find");
find.hidden = false;
find.addEventListener("input", () => {
  const wanted = plain(find.querySelector("input").value.trim());
  let count = 0;
  for (const part of document.querySelectorAll("[data-find]")) {
    const whole = plain(part.dataset.find).includes(wanted);
    const lines = [...part.querySelectorAll(".line")];
    for (const line of lines)
      line.hidden = !whole && !plain(line.firstElementChild.textContent).includes(wanted);
    part.hidden = !whole && lines.every((line) => line.hidden);
    count += !part.hidden;
  }
  find.querySelector("[role=status]").textContent = !wanted ? "" : count ? `${count} match` : "Nothing matches.";
});
