for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), shown = figure.querySelector("output");
  const rows = JSON.parse(figure.querySelector("script").textContent), line = svg.querySelector(".pointer");
  const hide = () => { shown.style.visibility = line.style.visibility = "hidden"; };
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const [place, lines] = rows.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    line.setAttribute("transform", `translate(${place} 0)`);
    shown.textContent = lines.join("\n");
    shown.style.visibility = line.style.visibility = "visible";
    const left = place / scale, width = shown.offsetWidth;
    shown.style.left = `${left + 12 + width > box.width ? Math.max(0, left - 12 - width) : left + 12}px`;
    shown.style.top = `${svg.offsetTop + 14}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
