const find = document.querySelector("#find");
find.hidden = false;
find.addEventListener("input", () => {
  const wanted = find.querySelector("input").value.trim().toLowerCase();
  document.body.classList.toggle("searching", wanted !== "");
  for (const part of document.querySelectorAll("[data-name]"))
    part.hidden = !part.dataset.name.toLowerCase().includes(wanted);
});
