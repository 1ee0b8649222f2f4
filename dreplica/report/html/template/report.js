"use strict";

// Sorting: a click on a column's name sorts by it, a second click reverses the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent.trim();
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, other) => {
        const a = key(one, column);
        const b = key(other, column);
        if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a < b ? -1 : 1;
        return String(a).localeCompare(String(b), "en", { numeric: true });
      });
      if (!up) rows.reverse();
      body.append(...rows);
    });
  });
}

// Copying: the command or text of the line, without its remark.
const said = document.getElementById("said");
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const source = button.parentElement.querySelector("code, .text");
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      // Without permission to write to the clipboard: select the text for the user to copy.
      getSelection().selectAllChildren(source);
      if (!document.execCommand("copy")) return;
    }
    button.classList.add("done");
    said.textContent = "StateCopy";
    setTimeout(() => {
      button.classList.remove("done");
      said.textContent = "";
    }, 1500);
  });
}
