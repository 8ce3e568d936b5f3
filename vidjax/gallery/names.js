// A click on a bar plays the film, and words in the search field hide all others.
document.addEventListener("click", (event) => {
  const bar = event.target.closest(".track i");
  if (bar) {
    const place = [...bar.parentElement.children].indexOf(bar);
    bar.closest(".line").querySelectorAll(".times li")[place].querySelector("a")?.click();
  }
  const link = event.target.closest(".times a[href*='t=']");
  if (link) link.target = "film";
});
const find = document.querySelector("#find");
find.hidden = false;
find.addEventListener("input", () => {
  const wanted = find.querySelector("input").value.trim().toLowerCase();
  let count = 0;
  for (const part of document.querySelectorAll("[data-find]")) {
    const whole = part.dataset.find.toLowerCase().includes(wanted);
    const lines = [...part.querySelectorAll(".line")];
    for (const line of lines)
      line.hidden = !whole && !line.firstElementChild.textContent.toLowerCase().includes(wanted);
    part.hidden = !whole && lines.every((line) => line.hidden);
    count += !part.hidden;
  }
  find.querySelector("[role=status]").textContent = !wanted ? "" : count ? `${count} found` : "Nothing is found.";
});
