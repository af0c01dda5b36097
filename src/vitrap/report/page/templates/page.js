"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);

  // Sorting: a press on a header's button; empty cells always last.
  const key = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = /^[-\u2212]?\d/.test(text) ? parseFloat(text) : NaN;
    return { text, number };
  };
  const compare = (a, b, numeric) =>
    (numeric && a.number - b.number) || a.text.localeCompare(b.text, "en", { numeric: true });
  const sort = (table, column, sign) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, key: key(row, column) }));
    const numeric = rows.every(({ key: { text, number } }) => !text || !Number.isNaN(number));
    rows.sort((a, b) => {
      if (!a.key.text || !b.key.text) return (a.key.text ? 0 : 1) - (b.key.text ? 0 : 1);
      return sign * compare(a.key, b.key, numeric);
    });
    body.append(...rows.map(({ row }) => row));
  };
  for (const table of all("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.firstElementChild.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        sort(table, column, rising ? 1 : -1);
      });
    });
  }

  // Filtering: the table's rows, and with them their sections and their marks in the chart.
  const summary = byId("summary");
  if (summary) {
    const parts = new Map();
    for (const part of all("details.run")) parts.set(`#${part.id}`, [part]);
    for (const mark of all(".plot a")) parts.get(mark.getAttribute("href"))?.push(mark);
    const rows = [...summary.tBodies[0].rows].map((row) => ({
      row,
      text: row.textContent.toLowerCase(),
      attack: row.cells[1].textContent,
      data: row.cells[2].textContent,
      parts: parts.get(row.querySelector("a").getAttribute("href")) ?? [],
    }));
    const [words, attack, data] = ["words", "attack", "data"].map(byId);
    const filter = () => {
      const wanted = words.value.toLowerCase().split(/\s+/);
      let shown = 0;
      for (const one of rows) {
        const fits =
          (!attack.selectedIndex || one.attack === attack.options[attack.selectedIndex].textContent) &&
          (!data.selectedIndex || one.data === data.options[data.selectedIndex].textContent) &&
          wanted.every((word) => one.text.includes(word));
        shown += fits;
        one.row.hidden = !fits;
        for (const part of one.parts) part.toggleAttribute("hidden", !fits);
      }
      byId("count").textContent = `${shown} of ${rows.length} runs shown`;
    };
    const form = byId("controls");
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter(); // a browser may bring back what was typed
  }

  // Sections: unpacked when they are opened, opened when a link leads to them.
  const packed = byId("packed");
  const packs = packed ? JSON.parse(packed.textContent) : [];
  const size = packed ? Number(packed.dataset.pack) : 1;
  const bodies = async (pack) => {
    const bytes = Uint8Array.from(atob(packs[pack]), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };
  const numbers = new Map(packed ? all("details.run").map((part, number) => [part, number]) : []);
  const fill = async (part) => {
    const number = numbers.get(part);
    numbers.delete(part);
    const body = document.createElement("div");
    body.className = "body";
    part.append(body);
    try {
      body.innerHTML = (await bodies(Math.floor(number / size)))[number % size];
    } catch {
      body.textContent = "This browser cannot unpack the section; a newer one can.";
    }
  };
  document.addEventListener(
    "toggle",
    (event) => {
      if (event.target.open && numbers.has(event.target)) fill(event.target);
    },
    true,
  );
  const open = (id) => {
    const part = byId(id);
    if (!part?.matches("details.run")) return;
    part.hidden = false;
    part.open = true;
    part.scrollIntoView();
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#run-"]');
    if (link) open(link.getAttribute("href").slice(1));
  });
  addEventListener("hashchange", () => open(location.hash.slice(1)));
  open(location.hash.slice(1));

  const buttons = byId("all");
  if (buttons) {
    buttons.hidden = false;
    [true, false].forEach((wanted, i) => {
      buttons.children[i].addEventListener("click", () => {
        for (const part of all("details.run")) if (!part.hidden) part.open = wanted;
      });
    });
  }
})();
