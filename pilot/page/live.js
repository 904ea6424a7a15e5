// Keeps the page of `pilot dashboard` up to date: asks for it again and again, and changes what differs.
(() => {
  "use strict";
  const EVERY_MS = 2000;
  const root = document.documentElement;
  const status = document.getElementById("live");
  let version = root.dataset.version;

  const say = (state, text) => {
    if (status.dataset.state !== state) status.dataset.state = state;
    if (status.textContent !== text) status.textContent = text;
  };

  // Makes `old` like `fresh`. What people have opened, focused or scrolled stays; charts are drawn elsewhere.
  function morph(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || (old.id || "") !== (fresh.id || "")) {
      old.replaceWith(document.importNode(fresh, true));
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      old.nodeValue = fresh.nodeValue;
      return;
    }
    const chart = old.classList.contains("chart");
    for (const { name, value } of Array.from(fresh.attributes)) {
      if (!(chart && name === "class") && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const { name } of Array.from(old.attributes)) {
      if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
    }
    if (chart) return;
    const before = Array.from(old.childNodes);
    const after = Array.from(fresh.childNodes);
    after.forEach((child, i) => {
      if (i < before.length) morph(before[i], child);
      else old.append(document.importNode(child, true));
    });
    before.slice(after.length).forEach((child) => child.remove());
  }

  async function update(answer) {
    const fresh = new DOMParser().parseFromString(`<div id="page">${answer.body}</div>`, "text/html");
    morph(document.getElementById("page"), fresh.getElementById("page"));
    document.title = answer.title;
    version = answer.version;
    root.dataset.version = version;
    await window.pilotReport.update(answer.figures);
    root.dataset.updates = Number(root.dataset.updates ?? 0) + 1;
  }

  async function poll() {
    let next = EVERY_MS;
    try {
      const headers = version ? { "If-None-Match": `"${version}"` } : {};
      const answer = await fetch(root.dataset.live, { headers, cache: "no-store" });
      if (answer.status === 200) {
        const found = await answer.json();
        if (found.behind) {
          say("reading", `Reading events: ${Math.round(100 * (1 - found.behind))} %`);
          next = 0;
        } else await update(found);
      }
      if (answer.status === 304 || answer.status === 200) {
        if (next) say("live", "Live: this page follows the run.");
      } else {
        const why = await answer.text();
        say("lost", why.length < 300 && why ? why : `The dashboard answers ${answer.status}.`);
        next = 5 * EVERY_MS;
      }
    } catch {
      say("lost", "The dashboard does not answer: this page shows what it said last.");
      next = 2 * EVERY_MS;
    }
    setTimeout(() => (document.hidden ? document.addEventListener("visibilitychange", poll, { once: true }) : poll()), next);
  }

  window.pilotReport.ready.then(poll);
})();
