"use strict";
// Sorting, for every table marked so: the header of a column becomes a button. The page reads whole without it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const said = document.getElementById(table.dataset.said);
  const valueOf = (row, index) => {
    const cell = row.cells[index];
    if (index === 0) return cell.dataset.name;
    const held = cell.querySelector("[data-value]");
    return held === null ? null : Number(held.dataset.value);
  };
  const compare = (index, sign) => (one, other) => {
    const a = valueOf(one, index), b = valueOf(other, index);
    if (a === null || b === null) return (a === null) - (b === null); // what was not measured comes last, either way
    return sign * (index === 0 ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  };
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const order = index === 0 ? ["ascending", "descending", "none"] : ["descending", "ascending", "none"];
    button.addEventListener("click", () => {
      const next = order[(order.indexOf(head.getAttribute("aria-sort") || "none") + 1) % 3];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      const rows = [...original];
      if (next !== "none") {
        head.setAttribute("aria-sort", next);
        rows.sort(compare(index, next === "ascending" ? 1 : -1));
      }
      body.append(...rows);
      const name = button.firstChild.textContent.trim();
      if (said) said.textContent = next === "none" ? "In the order of the network." : `Sorted by ${name}, ${next}.`;
    });
  });
}
// On paper everything is open.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
