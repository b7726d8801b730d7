// The planner of the book: every plan was computed when the book's data was written, and stands in the page as JSON.
// This script looks a choice up, adds its parts and draws them; it computes no plan and asks for nothing.
window.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("memory-planner");
  if (!place) return;
  const plans = JSON.parse(document.getElementById("memory-plans").textContent);
  const GIB = 2 ** 30;
  const LAYOUT = ["model", "tp", "pp", "cp"];
  const GROUPS = [
    ["Model and cuts", ["model", "tp", "pp", "cp", "sp", "sharding"]],
    ["Batch and recomputation", ["micro", "recompute"]],
    ["Number formats and kernels", ["precision", "gradients", "moments", "kernel"]],
  ];
  const NAMES = {
    model: "Model",
    tp: "Tensor parallel (TP)",
    pp: "Pipeline parallel (PP)",
    cp: "Context parallel (CP)",
    sp: "Sequence parallel",
    sharding: "States shared by",
    micro: "Micro batch, sequences",
    recompute: "Computed again in the backward pass",
    precision: "Matrix products in the layers",
    gradients: "Gradients",
    moments: "Adam's moments",
    kernel: "Loss kernel",
  };
  const first = (lever) => Object.keys(plans.levers[lever])[0];
  const firsts = Object.fromEntries(Object.keys(plans.levers).map((lever) => [lever, first(lever)]));
  const START = { ...firsts, model: "8B", tp: "2" };
  let wanted = { ...START };
  let choice = wanted; // what is shown: `wanted`, as far as its layout leaves it a choice

  // Without tensor parallelism there is nothing to share along the sequence.
  const settled = (any) => (any.tp === "1" ? { ...any, sp: "off" } : any);
  const gib = (bytes) => (bytes / GIB).toFixed(1);
  const sum = (sizes) => sizes.reduce((total, size) => total + size, 0);

  // One choice: why it is refused, or the bytes by component of the stage that needs more, and why parts are missing.
  function plan(any) {
    const chosen = settled(any);
    const row = plans.layouts.find((layout) => LAYOUT.every((lever) => layout[lever] === chosen[lever]));
    if (row.refused) return { refused: row.refused };
    const parts = Object.entries(plans.parts).map(([part, levers]) =>
      levers.reduce((branch, lever) => (typeof branch === "string" ? branch : branch[chosen[lever]]), row[part]),
    );
    const known = parts.filter((part) => typeof part !== "string");
    const missing = [...new Set(parts.filter((part) => typeof part === "string"))];
    if (typeof parts[0] === "string") return { refused: missing };
    const stages = known[0].map((_, stage) => known.flatMap((part) => part[stage]));
    const totals = stages.map(sum);
    const stage = totals.indexOf(Math.max(...totals));
    const { usable, ...taken } = row.usable[chosen.micro];
    return { sizes: stages[stage], total: totals[stage], last: stage > 0, missing, dp: row.dp, usable, taken };
  }

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
      else made[name] = value;
    }
    made.append(...children);
    return made;
  }

  const verdict = element("p", { className: "verdict", role: "status" });
  const bar = element("div", { className: "bar", role: "img" });
  const reasons = element("ul", { className: "reasons" });
  const summary = element("div", { className: "summary" }, verdict, bar, reasons);
  const details = element("div", { className: "details" });
  const controls = element("form", { className: "levers" });
  const options = [];
  for (const [title, levers] of GROUPS) {
    const group = element("div", { className: "group" }, element("p", { className: "title" }, title));
    for (const lever of levers) {
      const set = element("fieldset", { name: lever }, element("legend", {}, NAMES[lever]));
      for (const value of Object.keys(plans.levers[lever])) {
        const input = element("input", { type: "radio", name: lever, value });
        const effect = element("span", { className: "effect" });
        options.push({ lever, value, input, effect });
        set.append(element("label", {}, input, element("span", {}, value), effect));
      }
      group.append(set);
    }
    controls.append(group);
  }
  const again = element("button", { type: "reset" }, "Start again");
  controls.append(again);
  place.replaceChildren(controls, element("div", { className: "result" }, summary, details));

  function draw(notes = []) {
    choice = settled(wanted);
    const found = plan(wanted);
    for (const { lever, value, input, effect } of options) {
      input.checked = choice[lever] === value;
      const other = plan({ ...wanted, [lever]: value });
      if (other.refused) effect.textContent = "refused";
      else {
        const fits = other.total <= other.usable;
        effect.textContent = `${other.missing.length ? "over " : ""}${gib(other.total)} GiB${fits ? "" : ", too much"}`;
      }
    }
    controls.querySelector('[name="sp"]').disabled = choice.tp === "1";
    drawSummary(found, notes);
    drawDetails(found);
  }

  function drawSummary(found, notes) {
    const limit = found.usable;
    const name = ["tp", "pp", "cp"].map((lever) => `${lever.toUpperCase()}=${choice[lever]}`).join(" ");
    const said = notes.map((note) => element("span", { className: "note" }, `${note} `));
    reasons.replaceChildren(...(found.refused ?? []).map((reason) => element("li", {}, reason)));
    bar.hidden = Boolean(found.refused);
    if (found.refused) {
      verdict.replaceChildren(...said, element("strong", {}, `${choice.model}, ${name}: refused.`));
      return;
    }
    const fits = found.total <= limit;
    const head = `${choice.model}, ${name} DP=${found.dp}: ${found.missing.length ? "over " : ""}${gib(found.total)} GiB`;
    let words = fits ? `fits, ${gib(limit - found.total)} GiB are left` : `does not fit, ${gib(found.total - limit)} GiB too much`;
    if (found.missing.length) words = fits ? "of states alone, and activations are not planned" : `of states alone, ${words}`;
    verdict.replaceChildren(...said, element("strong", {}, head), `, ${words}.`);
    const whole = Math.max(limit * 1.08, found.total);
    const parts = found.sizes.map((size, part) => {
      const piece = element("span", { className: pattern(plans.components[part]) });
      piece.style.width = `${(100 * size) / whole}%`;
      return piece;
    });
    const mark = element("span", { className: "limit" });
    mark.style.left = `${(100 * limit) / whole}%`;
    bar.replaceChildren(...parts, mark);
    const listed = found.sizes.map((size, part) => `${plans.components[part]} ${gib(size)}`).join(", ");
    bar.setAttribute("aria-label", `GiB by component: ${listed}. The line stands at ${gib(limit)} GiB, which a plan may use.`);
  }

  const pattern = (component) => `part-${component.replace(" ", "-")}`;
  const line = (name, value, ...marks) =>
    element("tr", {}, element("th", { scope: "row" }, ...marks, name), element("td", {}, value));
  const table = (caption, rows) =>
    element("table", {}, element("caption", {}, caption), element("tbody", {}, ...rows));

  function drawDetails(found) {
    const pieces = [];
    if (!found.refused) {
      const rows = [];
      for (const [part, component] of plans.components.entries()) {
        if (component === "whole layers" && !found.sizes[part]) continue;
        const said = part < found.sizes.length ? gib(found.sizes[part]) : "not planned";
        rows.push(line(component, said, element("span", { className: `mark ${pattern(component)}` })));
      }
      rows.push(line("together", gib(found.total)), line("a plan may use", gib(found.usable)));
      const stage = choice.pp === "1" ? "of a rank" : `of the ${found.last ? "last" : "first"} of ${choice.pp} stages, which needs more`;
      pieces.push(table(`Planned memory ${stage}, GiB`, rows));
      const rest = Object.entries(found.taken).map(([name, bytes]) => line(name, gib(bytes)));
      pieces.push(table(`What takes the rest of an ${plans.gpu}, GiB`, rest));
      if (found.missing.length) {
        pieces.push(element("ul", { className: "reasons" }, ...found.missing.map((reason) => element("li", {}, reason))));
      }
      const { seq_length, global_batch_size } = plans.settings[choice.model];
      const count = global_batch_size / found.dp / Number(choice.micro);
      const tokens = seq_length.toLocaleString("en");
      pieces.push(element("p", {}, `${tokens} tokens a sequence; ${global_batch_size} sequences a step are ${count} micro batches on each copy of the model.`));
    }
    const lines = [...new Set(Object.entries(plans.levers).flatMap(([lever, values]) => values[choice[lever]]))];
    const imports = lines.filter((line) => /^(import|from) /.test(line));
    const others = lines.filter((line) => !imports.includes(line));
    const code = element("pre", {}, [...imports, ...others].join("\n"));
    pieces.push(element("details", {}, element("summary", {}, "The same in Python"), code));
    const open = details.querySelector("details")?.open;
    details.replaceChildren(...pieces);
    details.querySelector("details").open = Boolean(open);
  }

  // The address holds the choice, so that it can be handed on; an anchor of the page is none.
  function fromAddress() {
    const notes = [];
    if (!location.hash.includes("=")) return notes;
    for (const [lever, value] of new URLSearchParams(location.hash.slice(1))) {
      if (Object.hasOwn(plans.levers, lever) && Object.hasOwn(plans.levers[lever], value)) wanted[lever] = value;
      else notes.push(`The address asks for ${lever}=${value}, which is no choice here.`);
    }
    return notes;
  }

  controls.addEventListener("change", (event) => {
    wanted[event.target.name] = event.target.value;
    history.replaceState(null, "", `#${new URLSearchParams(settled(wanted))}`);
    draw();
  });
  controls.addEventListener("reset", (event) => {
    event.preventDefault();
    wanted = { ...START };
    history.replaceState(null, "", location.pathname + location.search);
    draw();
  });
  window.addEventListener("hashchange", () => draw(fromAddress()));
  draw(fromAddress());
});
