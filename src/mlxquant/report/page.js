"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const viewer = document.querySelector(".viewer");
  if (!viewer) return;
  document.documentElement.classList.add("js");
  const $ = (name) => viewer.querySelector(`[data-part="${name}"]`);
  const picture = (model, prompt) => document.getElementById(`p-${model}-${prompt}`);
  const under = $("under"), over = $("over"), canvas = $("canvas"), bar = $("bar"), split = $("split"), amplify = $("amplify");
  const state = { prompt: 0, model: data.models.length > 1 ? 1 : 0, mode: "slider", swapped: false };

  function difference(canvas, ...images) {
    const [a, b] = images.map((image) => {
      const surface = document.createElement("canvas");
      surface.width = image.naturalWidth;
      surface.height = image.naturalHeight;
      const context = surface.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, surface.width, surface.height);
    });
    canvas.width = a.width;
    canvas.height = a.height;
    const gain = 2 ** Number(amplify.value);
    for (let i = 0; i < a.data.length; i += 4) {
      for (let c = 0; c < 3; c += 1) a.data[i + c] = Math.min(255, gain * Math.abs(a.data[i + c] - b.data[i + c]));
    }
    canvas.getContext("2d").putImageData(a, 0, 0);
  }

  async function maps() {
    for (const cell of document.querySelectorAll(".cell")) {
      const image = cell.querySelector("img"), map = cell.querySelector("canvas");
      map.hidden = !$("maps").checked || cell.dataset.model === "0";
      if (map.hidden) continue;
      const reference = picture(0, cell.dataset.prompt);
      await Promise.all([reference.decode(), image.decode()]);
      difference(map, reference, image);
    }
  }

  function figures() {
    return data.metrics
      .filter((metric) => metric.text[state.model][state.prompt])
      .map((metric) => `${metric.title} ${metric.text[state.model][state.prompt]}`)
      .join(" · ");
  }

  async function show() {
    const prompt = data.prompts[state.prompt], model = data.models[state.model];
    under.src = picture(0, state.prompt).src;
    over.src = picture(state.model, state.prompt).src;
    $("prompt").textContent = prompt.text;
    $("figures").textContent = figures();
    $("place").textContent = `${state.prompt + 1} of ${data.prompts.length}`;
    $("model").value = String(state.model);
    const slider = state.mode === "slider";
    over.style.clipPath = slider ? `inset(0 0 0 ${split.value}%)` : "none";
    over.hidden = state.mode === "toggle" && state.swapped;
    bar.hidden = !slider;
    bar.style.left = `${split.value}%`;
    canvas.hidden = state.mode !== "difference";
    $("split-row").hidden = !slider;
    $("gain-row").hidden = canvas.hidden;
    $("flip").hidden = state.mode !== "toggle";
    $("left").hidden = !slider && !over.hidden;
    $("right").hidden = over.hidden;
    $("right").textContent = state.mode === "difference" ? `${model.name} − ${data.models[0].name}` : model.name;
    for (const button of viewer.querySelectorAll("[data-mode]")) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
    }
    document.querySelector(".cell.chosen")?.classList.remove("chosen");
    picture(state.model, state.prompt).closest(".cell").classList.add("chosen");
    if (!canvas.hidden) {
      await Promise.all([under.decode(), over.decode()]);
      difference(canvas, under, over);
      $("gain").textContent = `times ${2 ** Number(amplify.value)}`;
    }
  }

  const go = (by) => {
    state.prompt = (state.prompt + by + data.prompts.length) % data.prompts.length;
    show();
  };
  viewer.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.mode) state.mode = button.dataset.mode;
    if (button.dataset.by) return go(Number(button.dataset.by));
    if (button.dataset.part === "flip") state.swapped = !state.swapped;
    show();
  });
  $("model").addEventListener("change", (event) => {
    state.model = Number(event.target.value);
    show();
  });
  for (const input of [split, amplify]) input.addEventListener("input", show);
  $("maps").addEventListener("change", maps);
  amplify.addEventListener("change", maps);
  const stage = $("stage");
  const drag = (event) => {
    if (state.mode !== "slider" || (event.type === "pointermove" && event.buttons !== 1)) return;
    const box = stage.getBoundingClientRect();
    split.value = String(Math.max(0, Math.min(100, (100 * (event.clientX - box.left)) / box.width)));
    show();
  };
  stage.addEventListener("pointerdown", (event) => {
    if (state.mode === "toggle") {
      state.swapped = !state.swapped;
      show();
    }
    drag(event);
  });
  stage.addEventListener("pointermove", drag);
  stage.addEventListener("dragstart", (event) => event.preventDefault());
  for (const cell of document.querySelectorAll(".cell")) {
    cell.addEventListener("click", () => {
      state.prompt = Number(cell.dataset.prompt);
      state.model = Number(cell.dataset.model) || state.model;
      show();
      viewer.scrollIntoView({ block: "nearest" });
    });
  }
  show();
})();
