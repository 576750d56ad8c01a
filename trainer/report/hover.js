// Values at the pointer, or the finger, in every figure
for (const figure of document.querySelectorAll("figure")) {
  const shown = figure.querySelector("output"), data = JSON.parse(figure.querySelector("script").textContent);
  const said = (tag, kind, text) => Object.assign(document.createElement(tag), { className: kind, textContent: text });
  for (const svg of figure.querySelectorAll("svg")) {
    const line = svg.querySelector(".pointer"), view = svg.viewBox.baseVal.width;
    const left = +svg.dataset.left, width = view - left - svg.dataset.right;
    const hide = () => { shown.style.visibility = line.style.visibility = "hidden"; };
    const show = (event) => {
      const box = svg.getBoundingClientRect(), scale = view / box.width;
      const x = ((event.clientX - box.left) * scale - left) / width * data.last;
      const [at, epoch, values] = data.rows.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const phase = data.shaded.some(([begin, end]) => at > begin && at <= end) ? ", sparse phase" : "";
      const rows = values.map(([number, text]) => {
        const row = said("div", "", ""), [title, kind] = data.series[number];
        row.append(said("span", kind, title), said("b", "", text));
        return row;
      });
      shown.replaceChildren(said("small", "", `epochs done: ${epoch}${phase}`), ...rows);
      const place = (left + width * at / data.last) / scale, wide = shown.offsetWidth;
      line.setAttribute("transform", `translate(${place * scale} 0)`);
      shown.style.visibility = line.style.visibility = "visible";
      const offset = box.left - figure.getBoundingClientRect().left;
      const beside = place + 12 + wide > box.width ? place - 12 - wide : place + 12;
      shown.style.left = `${offset + Math.min(Math.max(0, beside), Math.max(0, box.width - wide))}px`;
      shown.style.top = `${svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + 12}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
