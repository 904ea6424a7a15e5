// Draws the figures of the page. What they show is in #figures, as JSON; nothing is fetched.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const report = { views: {}, errors: [] };

  const options = {
    renderer: "svg",
    actions: false,
    ast: true, // expressions are interpreted: the page's policy forbids eval
    tooltip: { disableDefaultStyle: true },
    defaultStyle: false,
  };

  async function draw(place) {
    const name = place.id;
    try {
      const { view } = await vegaEmbed(place, specs[name], options);
      report.views[name] = view;
      if (place.dataset.zoom) keys(place, view, place.dataset.zoom);
    } catch (error) {
      report.errors.push(`${name}: ${error}`);
      place.textContent = "This chart cannot be drawn; its numbers are below.";
    }
  }

  // Arrow keys move the lanes in time, plus and minus zoom, Escape shows all.
  function keys(place, view, signal) {
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
  }

  report.ready = Promise.all(Array.from(document.querySelectorAll(".chart"), draw)).then(() => {
    document.documentElement.dataset.drawn = report.errors.length ? "with errors" : "yes";
  });
  window.pilotReport = report;
})();
