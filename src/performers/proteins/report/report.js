"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 36rem)");
  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
  const letterName = (letter) => (data.names[letter] ? `${data.names[letter]} (${letter})` : letter);
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Charts: Vega-Lite, by its expression interpreter, which needs no eval.
  const views = new Map();
  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: soft, titleColor: soft, labelFont: font, titleFont: font,
      labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
    return {
      range: { category: data.categories[dark.matches ? "dark" : "light"] },
      font, background: "transparent", view: { stroke: line }, title: { color: ink, font, fontSize: 14 },
      axis: { ...text, gridColor: line, domainColor: line, tickColor: line },
      legend: text,
    };
  };
  const draw = async (element) => {
    const name = element.dataset.chart;
    const spec = structuredClone(data.charts[name]);
    const config = theme();
    Object.assign(config.legend, spec.config?.legend,
      narrow.matches && { orient: "bottom", columns: 2, labelLimit: 110 });
    delete spec.config;
    if (name.startsWith("similarity")) {
      // Square cells in the width that there is.
      const cell = Math.max(9, Math.floor((Math.min(element.clientWidth, 400) - 24) / 20));
      spec.width = spec.height = { step: cell };
    } else {
      Object.assign(spec, { width: "container", autosize: { type: "fit", contains: "padding" } });
    }
    if (name === "map") {
      const chosen = document.querySelector("input[name=colour]:checked");
      spec.encoding.color = data.colours[chosen ? +chosen.value : 0];
      spec.params[0].value = current;
    }
    if (name === "track") {
      spec.data.values = trackValues();
      if (!spec.data.values.length) return element.replaceChildren();
    }
    const { view } = await vegaEmbed(element, spec, { ast: true, actions: false, renderer: "svg",
      config, tooltip: { theme: dark.matches ? "dark" : "light" } });
    views.get(name)?.finalize();
    views.set(name, view);
    if (name === "map") {
      view.addEventListener("click", (_, item) => item?.datum?.number >= 0 && choose(item.datum.number, true));
    }
  };
  const charts = [...document.querySelectorAll("[data-chart]")];
  let drawn = false;
  const drawAll = () => {
    drawn = true;
    charts.forEach(draw);
  };
  document.querySelectorAll("input[name=colour]").forEach((input) =>
    input.addEventListener("change", () => draw(document.querySelector("[data-chart=map]"))));

  // The table: sorted by its headings, filtered by the search field.
  const table = byId("proteins");
  const rows = table ? [...table.tBodies[0].rows] : [];
  rows.forEach((row, number) => {
    row.number = number;
    row.querySelector("button").addEventListener("click", () => choose(number, true));
  });
  const sortBy = (button) => {
    const heading = button.closest("th");
    const key = button.dataset.key;
    const rising = heading.ariaSort !== "ascending";
    table.querySelectorAll("thead th").forEach((cell) => (cell.ariaSort = "none"));
    heading.ariaSort = rising ? "ascending" : "descending";
    const compare = (a, b) => {
      const [x, y] = [data.proteins[a.number][key], data.proteins[b.number][key]];
      // What is missing comes last, either way.
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
      return rising ? order : -order;
    };
    table.tBodies[0].append(...rows.sort(compare));
  };
  table?.querySelectorAll("thead button").forEach((button) =>
    button.addEventListener("click", () => sortBy(button)));
  byId("find")?.addEventListener("input", ({ target }) => {
    const words = target.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const { name, description } = data.proteins[row.number];
      row.hidden = !`${name} ${description}`.toLowerCase().includes(words);
      shown += !row.hidden;
    }
    byId("found").textContent = words ? `${shown} of ${rows.length} proteins` : "";
  });

  // One protein: its residues as letters, coloured by probability.
  let current = data.chosen;
  let residues = [];
  let place = 0;
  const decode = ({ sequence, own, others, shares }) => {
    const share = (letter) => {
      const level = data.levels.indexOf(letter);
      return level < 0 ? null : (level / (data.levels.length - 1)) ** 2;
    };
    const kept = others.length / sequence.length;
    return [...sequence].map((letter, index) => ({
      letter, probability: share(own[index]),
      others: Array.from({ length: kept }, (_, n) =>
        [others[index * kept + n], share(shares[index * kept + n])]),
    }));
  };
  const others = (residue) =>
    residue.others.map(([letter, share]) => `${letterName(letter)} ${percent(share)}`).join(", ");
  const tell = (index) => {
    const residue = residues[index];
    const start = `Residue ${index + 1}: ${letterName(residue.letter)}. `;
    return start + (residue.probability === null ? "The model makes no guess here."
      : `Probability ${percent(residue.probability)}. Likeliest others: ${others(residue)}.`);
  };
  const moveTo = (index, scroll = false) => {
    const letters = byId("letters");
    const cells = letters.querySelectorAll("b");
    cells[place]?.classList.remove("here");
    place = Math.max(0, Math.min(residues.length - 1, index));
    const cell = cells[place];
    cell.classList.add("here");
    if (scroll) cell.scrollIntoView({ block: "nearest" });
    const told = tell(place);
    byId("reading").textContent = told;
    letters.setAttribute("aria-valuenow", place + 1);
    letters.setAttribute("aria-valuetext", told);
    views.get("track")?.signal("chosen", place + 1).run();
  };
  const trackValues = () => residues
    .map((residue, index) => ({ place: index + 1, probability: residue.probability,
      residue: `${letterName(residue.letter)} ${index + 1}`, others: others(residue) }))
    .filter(({ probability }) => probability !== null);
  const choose = (number, scroll = false) => {
    current = number;
    rows.forEach((row) => row.classList.toggle("chosen", row.number === number));
    views.get("map")?.signal("chosen", number).run();
    const { name, description, length, surprise, accuracy } = data.proteins[number];
    const numbers = surprise === null ? ""
      : `, surprise ${surprise.toFixed(2)} bits, ${percent(accuracy)} guessed right`;
    const track = data.tracks[number];
    byId("about").textContent = `${name}${description ? ` (${description})` : ""}: ${length} residues${numbers}.`
      + (track ? "" : " Its residues are not on this page; make the report with --max-residues larger or --protein.");
    const letters = byId("letters");
    letters.replaceChildren();
    residues = track ? decode(track) : [];
    if (track) byId("protein").value = number;
    letters.setAttribute("aria-valuemax", Math.max(1, residues.length));
    for (let start = 0; start < residues.length; start += 10) {
      const block = make("div", {}, make("small", { textContent: start + 1 }));
      residues.slice(start, start + 10).forEach(({ letter, probability }) => {
        const level = probability === null ? 0 : [0.05, 0.15, 0.35, 0.7].filter((end) => probability >= end).length;
        block.append(make("b", { className: `p${level}`, textContent: letter }));
      });
      letters.append(block);
    }
    place = 0;
    byId("reading").textContent = track
      ? "Point at a residue, or move through them with the arrow keys." : "";
    if (drawn) draw(byId("track"));
    if (scroll) byId("residues").scrollIntoView();
  };
  const keys = (steps, move) => (event) => {
    const step = steps()[event.key];
    if (step === undefined) return;
    event.preventDefault();
    move(step);
  };
  const letters = byId("letters");
  if (letters) {
    const at = (cell) => [...letters.querySelectorAll("b")].indexOf(cell);
    for (const kind of ["mouseover", "click"]) {
      letters.addEventListener(kind, ({ target }) => target.tagName === "B" && moveTo(at(target)));
    }
    letters.addEventListener("keydown", keys(
      () => ({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }),
      (step) => {
        const started = letters.querySelector(".here");
        if (residues.length) moveTo(started ? place + step : step > 0 && step < 20 ? 0 : residues.length - 1, true);
      }));
    const chooser = byId("protein");
    chooser.addEventListener("change", () => choose(+chooser.value));
    for (const [id, step] of [["previous", -1], ["next", 1]]) {
      byId(id).addEventListener("click", () => {
        const count = chooser.options.length;
        if (!count) return;
        chooser.selectedIndex = (chooser.selectedIndex + step + count) % count;
        choose(+chooser.value);
      });
    }
  }

  // Attention: grey images hold the weights, 255 sqrt(weight / max); a cell is a bin of residues.
  const scales = {
    light: [[255, 255, 255], [158, 201, 226], [23, 100, 171], [4, 26, 61]],
    dark: [[26, 32, 40], [22, 78, 128], [96, 170, 222], [240, 249, 255]],
  };
  const colour = (share) => {
    const stops = scales[dark.matches ? "dark" : "light"];
    const at = Math.min(1, share) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    return stops[low].map((value, channel) => value + (stops[low + 1][channel] - value) * (at - low));
  };
  const decodeImage = async (head) => {
    const image = new Image();
    image.src = `data:image/png;base64,${head.image}`;
    await image.decode();
    const canvas = make("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    head.size = image.width;
    head.weights = Float32Array.from({ length: head.size ** 2 },
      (_, cell) => head.max * (pixels[4 * cell] / 255) ** 2);
  };
  const paint = (head) => {
    const painted = new ImageData(head.size, head.size);
    head.weights.forEach((weight, cell) =>
      painted.data.set([...colour(Math.sqrt(weight / head.limit)), 255], 4 * cell));
    const canvas = make("canvas", { width: head.size, height: head.size });
    canvas.getContext("2d").putImageData(painted, 0, 0);
    return canvas;
  };
  const title = ({ layer, head, note }) => `Layer ${layer}, head ${head}${note ? ` (${note})` : ""}`;
  const tiles = [];
  for (const grid of document.querySelectorAll("[data-maps]")) {
    const maps = data.maps[grid.dataset.maps];
    maps.heads.forEach((head, number) => {
      let group = grid.querySelector(`[data-layer="${head.layer}"]`);
      if (!group) {
        group = make("div", { className: "layer" }, make("h4", { textContent: `Layer ${head.layer}` }));
        group.dataset.layer = head.layer;
        grid.append(group);
      }
      const canvas = make("canvas");
      const button = make("button", { className: "head", ariaLabel: `${title(head)}, open large` },
        canvas, `${head.head}${head.note ? ` ${head.note}` : ""}`);
      button.addEventListener("click", () => open(maps, number));
      group.append(button);
      tiles.push({ head, canvas });
    });
  }
  const paintTile = ({ head, canvas }) => {
    const painted = paint(head);
    canvas.width = canvas.height = head.size;
    canvas.getContext("2d").drawImage(painted, 0, 0);
  };
  const ready = Promise.all(tiles.map(async (tile) => {
    await decodeImage(tile.head);
    paintTile(tile);
  }));

  const dialog = byId("large");
  const canvas = byId("canvas");
  const MARGIN = 56;
  let shown = null;
  const open = async (maps, number) => {
    await ready;
    shown = { maps, number, row: 0, column: 0, painted: paint(maps.heads[number]) };
    const head = maps.heads[number];
    byId("large-title").textContent = `${maps.protein}: ${title(head).toLowerCase()}`;
    byId("limit").textContent = `${percent(head.limit, 1)} or more`;
    if (!dialog.open) dialog.showModal();
    show();
    byId("value").textContent = "Point at a cell, or move with the arrow keys.";
  };
  const span = (bin) => {
    const { residues: letters, step } = shown.maps;
    const [first, last] = [bin * step + 1, Math.min(letters.length, (bin + 1) * step)];
    return first === last ? `${letters[first - 1]}${first}` : `${letters[first - 1]}${first} to ${letters[last - 1]}${last}`;
  };
  const show = () => {
    const ratio = devicePixelRatio || 1;
    const side = canvas.clientWidth;
    canvas.width = canvas.height = Math.round(side * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const { maps, painted, row, column } = shown;
    const { size } = maps.heads[shown.number];
    const inner = side - MARGIN - 8;
    const cell = inner / size;
    context.imageSmoothingEnabled = false;
    context.drawImage(painted, MARGIN, MARGIN, inner, inner);
    context.strokeStyle = style.getPropertyValue("--line");
    context.strokeRect(MARGIN - 0.5, MARGIN - 0.5, inner + 1, inner + 1);
    context.fillStyle = style.getPropertyValue("--soft");
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const count = maps.residues.length;
    const gap = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((g) => (count / g) * 38 <= inner) ?? 2000;
    const position = (number) => MARGIN + ((number - 0.5) / maps.step) * cell;
    context.textAlign = "center";
    for (let number = gap; number <= count; number += gap) context.fillText(number, position(number), MARGIN - 6);
    context.textAlign = "right";
    for (let number = gap; number <= count; number += gap) context.fillText(number, MARGIN - 6, position(number) + 4);
    context.textAlign = "center";
    context.fillText("residue gathered from", MARGIN + inner / 2, 18);
    context.save();
    context.rotate(-Math.PI / 2);
    context.fillText("residue that gathers", -(MARGIN + inner / 2), 14);
    context.restore();
    context.fillStyle = style.getPropertyValue("--mark");
    for (const site of maps.sites) {
      context.beginPath();
      context.arc(position(site), MARGIN - 2, 3, 0, 7);
      context.arc(MARGIN - 2, position(site), 3, 0, 7);
      context.fill();
    }
    context.strokeStyle = style.getPropertyValue("--mark");
    context.lineWidth = 1.5;
    context.strokeRect(MARGIN + column * cell - 1, MARGIN + row * cell - 1, Math.max(cell, 3) + 2, Math.max(cell, 3) + 2);
  };
  const pointTo = (row, column) => {
    const head = shown.maps.heads[shown.number];
    const inside = (value) => Math.max(0, Math.min(head.size - 1, value));
    Object.assign(shown, { row: inside(row), column: inside(column) });
    const weight = head.weights[shown.row * head.size + shown.column];
    const [from, to, share] = [span(shown.row), span(shown.column), percent(weight, 2)];
    byId("value").textContent = shown.maps.step > 1
      ? `Residues ${from} each give ${share} of their attention to each of ${to}, on average.`
      : `${from} gives ${share} of its attention to ${to}.`;
    show();
  };
  if (dialog) {
    const move = ({ offsetX, offsetY }) => {
      const { size } = shown.maps.heads[shown.number];
      const cell = (canvas.clientWidth - MARGIN - 8) / size;
      const [column, row] = [offsetX, offsetY].map((offset) => Math.floor((offset - MARGIN) / cell));
      if (row >= 0 && column >= 0 && row < size && column < size) pointTo(row, column);
    };
    canvas.addEventListener("mousemove", move);
    canvas.addEventListener("click", move);
    canvas.addEventListener("keydown", keys(
      () => ({ ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }),
      ([down, right]) => pointTo(shown.row + down, shown.column + right)));
    dialog.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => {
      const count = shown.maps.heads.length;
      open(shown.maps, (shown.number + Number(button.dataset.step) + count) % count);
    }));
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    addEventListener("resize", () => dialog.open && show());
  }

  dark.addEventListener("change", async () => {
    drawAll();
    await ready;
    tiles.forEach(paintTile);
    if (dialog.open) open(shown.maps, shown.number);
  });
  narrow.addEventListener("change", drawAll);
  if (data.proteins.length) choose(current);
  drawAll();
})();
