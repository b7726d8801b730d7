// Troubleshooting: a field that leaves the rows with the words of what you see. Everything stands in the page already.
window.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("find-a-symptom");
  if (!place) return;
  const tables = [...document.querySelectorAll(".bd-article table")].filter(
    (table) => table.tHead?.textContent.trim().startsWith("what you see"),
  );
  const rows = tables
    .flatMap((table) => [...table.tBodies[0].rows])
    .map((row) => ({ row, words: row.textContent.toLowerCase() }));

  const label = document.createElement("label");
  label.textContent = "Words of what you see";
  const field = document.createElement("input");
  field.type = "search";
  field.autocomplete = "off";
  field.spellcheck = false;
  label.append(field);
  const said = document.createElement("p");
  said.setAttribute("role", "status");
  place.append(label, said);

  // Numbers, paths and addresses differ from machine to machine: words of three letters or more count.
  const asked = () => [...new Set(field.value.toLowerCase().match(/[a-z_]{3,}/g) ?? [])];

  function show() {
    const words = asked();
    const found = rows.map(({ words: text }) => words.filter((word) => text.includes(word)).length);
    const most = Math.max(...found);
    const needed = Math.min(words.length, most);
    const wanted = found.map((count) => !words.length || (most > 0 && count === needed));
    rows.forEach(({ row }, number) => (row.hidden = !wanted[number]));
    for (const table of tables) {
      const empty = [...table.tBodies[0].rows].every((row) => row.hidden);
      (table.closest("section") ?? table).hidden = empty;
    }
    const count = wanted.filter(Boolean).length;
    const rowsOf = (number) => `${number} ${number === 1 ? "row" : "rows"}`;
    if (!words.length) said.textContent = `${rows.length} symptoms`;
    else if (!count) said.textContent = "No row has any of these words.";
    else if (needed === words.length) said.textContent = `${rowsOf(count)} of ${rows.length}`;
    else said.textContent = `No row has all of these words; nearest, with ${needed} of ${words.length}: ${rowsOf(count)}`;
  }

  field.addEventListener("input", show);
  field.value = new URLSearchParams(location.search).get("symptom") ?? "";
  show();
});
