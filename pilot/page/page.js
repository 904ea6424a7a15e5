// Draws the figures of the page. What they show is in #figures, as JSON; nothing is fetched.
(() => {
  "use strict";
  let specs = JSON.parse(document.getElementById("figures").textContent);
  const report = { views: {}, errors: [], update };
  const drawn = {}; // name → the specification that is on the page, as text
  const windows = {}; // name → the part of the time axis that somebody has chosen

  const options = {
    renderer: "svg",
    actions: false,
    ast: true, // expressions are interpreted: the page's policy forbids eval
    tooltip: { disableDefaultStyle: true },
    defaultStyle: false,
  };

  async function draw(place) {
    const name = place.id;
    const text = JSON.stringify(specs[name]);
    if (drawn[name] === text && place.querySelector("svg")) return;
    drawn[name] = text;
    try {
      const room = place.querySelector("svg") ? behind(place) : place;
      const { view } = await vegaEmbed(room, JSON.parse(text), options);
      if (room !== place) exchange(place, room);
      report.views[name]?.finalize();
      report.views[name] = view;
      if (room.dataset.zoom) keys(room, view, room.dataset.zoom);
    } catch (error) {
      report.errors.push(`${name}: ${error}`);
      place.textContent = "This chart cannot be drawn; its numbers are below.";
    }
  }

  // Room for the next picture of a chart, out of sight until it is drawn: nothing flickers.
  function behind(place) {
    const room = place.cloneNode(false);
    room.className = "chart";
    room.removeAttribute("id");
    room.style.cssText += `;position:absolute;visibility:hidden;width:${place.clientWidth}px`;
    place.after(room);
    return room;
  }

  function exchange(place, room) {
    const focused = document.activeElement === place;
    for (const name of ["position", "visibility", "width"]) room.style.removeProperty(name);
    const name = place.id;
    place.remove();
    room.id = name;
    if (focused) room.focus({ preventScroll: true });
  }

  // Arrow keys move the lanes in time, plus and minus zoom, Escape shows all.
  function keys(place, view, signal) {
    const name = place.id;
    const [low, high] = JSON.parse(place.dataset.domain);
    let shown = [low, high];
    const show = (start, end) => {
      const length = Math.min(high - low, Math.max((high - low) / 500, end - start));
      const from = Math.min(Math.max(low, start), high - length);
      shown = [from, from + length];
      view.signal(signal, shown).runAsync();
    };
    view.addSignalListener(signal, (_, value) => {
      shown = value && value.length === 2 ? Array.from(value) : [low, high];
      windows[name] = shown[0] > low || shown[1] < high ? shown : undefined;
    });
    place.addEventListener("keydown", (event) => {
      const [start, end] = shown;
      const length = end - start;
      const moves = {
        ArrowLeft: [start - length / 5, end - length / 5],
        ArrowRight: [start + length / 5, end + length / 5],
        "+": [start + length / 5, end - length / 5],
        "=": [start + length / 5, end - length / 5],
        "-": [start - length / 3, end + length / 3],
        Escape: [low, high],
      };
      if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
        show(...moves[event.key]);
        event.preventDefault();
      }
    });
    place.addEventListener("dblclick", () => show(low, high));
    if (windows[name] && windows[name][1] <= high) show(...windows[name]);
  }

  function drawAll() {
    report.ready = Promise.all(Array.from(document.querySelectorAll(".chart[id]"), draw)).then(() => {
      document.documentElement.dataset.drawn = report.errors.length ? "with errors" : "yes";
    });
    return report.ready;
  }

  // Other figures, for a page whose places for them have been changed already.
  function update(figures) {
    specs = figures;
    for (const name of Object.keys(report.views)) {
      if (!document.getElementById(name)) {
        report.views[name].finalize();
        delete report.views[name];
        delete drawn[name];
      }
    }
    return drawAll();
  }

  drawAll();
  window.pilotReport = report;
})();
