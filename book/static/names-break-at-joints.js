// A name such as cfg.train.global_batch_size is one word to a browser, and a table with two of them is wider than a phone.
// Here it may go on below after a dot, an underscore, a slash or an equals sign, and before a capital; what is copied
// stays one word.
window.addEventListener("DOMContentLoaded", () => {
  const words = document.querySelectorAll(".bd-article code .pre, .bd-article table.table :is(td, th)");
  const texts = new Set();
  for (const word of words) {
    const walker = document.createTreeWalker(word, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) texts.add(walker.currentNode);
  }
  for (const text of texts) {
    const pieces = text.data.split(/(?<=[_/=]|[a-z]\.)(?=\w)|(?<=[a-z])(?=[A-Z])/);
    if (pieces.length === 1 || text.parentElement.closest("mjx-container, script")) continue;
    text.replaceWith(...pieces.flatMap((piece, place) => (place ? [document.createElement("wbr"), piece] : [piece])));
  }
});
