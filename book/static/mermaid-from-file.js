// A browser imports no module into a page that was opened as a file, so diagrams would stay source text there.
// This loads the same mermaid as a plain script in that one case.
if (location.protocol === "file:") {
  const here = document.currentScript.src;
  window.addEventListener("DOMContentLoaded", () => {
    const diagrams = document.querySelectorAll("pre.mermaid, .mermaid");
    if (!diagrams.length) return;
    const script = document.createElement("script");
    script.src = new URL("mermaid/mermaid.min.js", here).href;
    script.onload = () => {
      const dark = document.documentElement.dataset.theme === "dark";
      mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "default", flowchart: { wrappingWidth: 480 } });
      mermaid.run({ nodes: diagrams });
    };
    document.head.append(script);
  });
}
