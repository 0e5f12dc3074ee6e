"use strict";

// Sorts a table by the column whose header is clicked, upwards first; missing values stay last. Rows that are equal keep
// their order, so a click on one header after another sorts by the second and, within it, by the first.
const words = new Intl.Collator("en", { numeric: true });

function sort(table, place) {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[place];
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const isNumber = head.classList.contains("number");
  const value = (row) => row.cells[place]?.dataset.sort;
  const compare = (a, b) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return sign * (isNumber ? (+a > +b) - (+a < +b) : words.compare(a, b));
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  for (const other of heads) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => sort(table, place));
  });
}
