// Controls whose answer Python computes do nothing on a page: say so, and do not let them look alive.
// Controls that are linked to each other in the browser (ipywidgets.jslink) work here, and are left alone.
window.addEventListener("DOMContentLoaded", () => {
  // Widgets ask for formulae as MathJax 2 was asked, and the book has its successor.
  const typeset = (element) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element]));
  if (window.MathJax) MathJax.Hub ??= { Queue: ([, , element]) => typeset(element) };
  const state = document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]');
  if (!state || /"(Directional)?LinkModel"/.test(state.textContent)) return;
  const controls = ".jupyter-widgets select, .jupyter-widgets input, .jupyter-widgets textarea, button.jupyter-button";
  const quieten = () => {
    for (const control of document.querySelectorAll(controls)) {
      control.disabled = true;
      const output = control.closest(".cell_output");
      if (!output || output.querySelector(".needs-a-kernel")) continue;
      const note = document.createElement("p");
      note.className = "needs-a-kernel";
      note.textContent = "Run this lesson in JupyterLab to use these controls; here you see them as they were.";
      output.prepend(note);
    }
  };
  new MutationObserver(quieten).observe(document.body, { childList: true, subtree: true });
  quieten();
});
