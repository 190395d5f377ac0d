// A slider shows one of its figures.
for (const frames of document.querySelectorAll(".frames:has(input)")) {
  const slider = frames.querySelector("input");
  const figures = [...frames.querySelectorAll("figure")];
  const show = () => {
    figures.forEach((figure, i) => figure.classList.toggle("shown", i === Number(slider.value)));
    frames.querySelector("output").textContent = figures[slider.value].dataset.label;
  };
  slider.addEventListener("input", show);
  frames.classList.add("live");
  show();
}
