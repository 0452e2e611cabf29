"use strict";

const $ = (id) => document.getElementById(id);
let models = [], maxBytes = {}, model = null;
let inputs = {}; // content of each input: a File, or a function that returns a text
let requests = 0; // number of requests so far: only the prediction of the last one is shown

async function start() {
  const response = await fetch("models");
  ({ models, max_bytes: maxBytes } = await response.json());
  for (const { name } of models) $("model").add(new Option(name, name));
  $("choice").hidden = models.length < 2;
  $("model").onchange = () => show(models[$("model").selectedIndex]);
  $("form").onsubmit = (event) => { event.preventDefault(); predict(); };
  show(models[0]);
}

function element(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

function show(chosen) {
  model = chosen;
  inputs = {};
  requests += 1;
  $("title").textContent = model.name;
  const types = Object.values(model.inputs);
  $("hint").textContent = types.some(isText) ? "or Ctrl + Enter" : "";
  $("inputs").replaceChildren(...Object.entries(model.inputs).map(([name, type]) => (isText(type) ? textInput : fileInput)(name, type)));
  reset();
}

const isText = (type) => type.startsWith("text/");
const labeled = (name, field) => element("label", { className: "input" }, element("span", { className: "name", textContent: name }), field);

function textInput(name) {
  const area = element("textarea", { id: `input-${name}`, placeholder: "Type or paste a text", spellcheck: false });
  area.onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) predict(); };
  inputs[name] = () => area.value;
  return labeled(name, area);
}

function fileInput(name, type) {
  const noun = type.startsWith("image/") ? "image" : "file";
  const chooser = element("input", { type: "file", accept: type, id: `input-${name}` });
  const caption = element("span", { textContent: `Drop or paste ${noun === "image" ? "an" : "a"} ${noun} here, or click to choose one` });
  const area = element("span", { className: "drop" }, caption, chooser);
  const take = (file) => {
    if (!file) return;
    inputs[name] = file;
    area.querySelector("img")?.remove();
    caption.textContent = file.name;
    if (type.startsWith("image/")) {
      const image = element("img", { alt: "", src: URL.createObjectURL(file) });
      image.onload = () => URL.revokeObjectURL(image.src);
      image.onerror = () => { URL.revokeObjectURL(image.src); image.remove(); };
      area.prepend(image);
    }
    if (Object.values(model.inputs).length === 1) predict();
  };
  chooser.onchange = () => { take(chooser.files[0]); chooser.value = ""; };
  area.ondragover = (event) => { event.preventDefault(); area.classList.add("over"); };
  area.ondragleave = () => area.classList.remove("over");
  area.ondrop = (event) => { event.preventDefault(); area.classList.remove("over"); take(event.dataTransfer.files[0]); };
  area.take = take;
  return labeled(name, area);
}

document.onpaste = (event) => {
  const area = document.querySelector(".drop");
  if (area && event.clipboardData.files.length) area.take(event.clipboardData.files[0]);
};
// A file that is dropped outside the drop area must not replace the page.
document.ondragover = document.ondrop = (event) => event.preventDefault();

function reset() {
  $("empty").hidden = false;
  $("error").hidden = $("prediction").hidden = true;
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  $("empty").hidden = $("prediction").hidden = true;
}

async function predict() {
  const form = new FormData();
  for (const name of Object.keys(model.inputs)) {
    const value = typeof inputs[name] === "function" ? inputs[name]() : inputs[name];
    if (!value || (typeof value === "string" && !value.trim())) return showError(`The input ${name} is missing.`);
    if (value.size > maxBytes.body) return showError(`${value.name} is too large: the limit is ${(maxBytes.body / 2 ** 20).toFixed(1)} MiB.`);
    form.append(name, value);
  }
  const request = (requests += 1);
  const started = performance.now();
  $("predict").disabled = true;
  try {
    const response = await fetch(`models/${model.name}/predict`, { method: "POST", body: form });
    const content = await response.json().catch(() => ({ detail: response.statusText }));
    if (request !== requests) return;
    if (response.ok) showPrediction(content, performance.now() - started);
    else showError(typeof content.detail === "string" ? content.detail : "The request was refused.");
  } catch {
    if (request === requests) showError("The server does not respond.");
  } finally {
    $("predict").disabled = false;
  }
}

function showPrediction(prediction, milliseconds) {
  if (prediction.note) return showError(`There is no prediction: ${prediction.note}.`); // only unknown words, for example
  const { label, labels, probability, probabilities, ...rest } = prediction;
  const chosen = labels ?? (label === undefined ? [] : [label]);
  $("label").replaceChildren(labels && !labels.length ? "no label" : chosen.join(", "));
  if (probability !== undefined) $("label").append(element("small", { textContent: percent(probability) }));
  $("label").hidden = label === undefined && labels === undefined;
  const bars = Object.entries(probabilities ?? {}).sort((a, b) => b[1] - a[1]).map(([name, p]) => bar(name, p, chosen.includes(name)));
  const others = Object.entries(rest).map(([name, value]) => element("tr", {}, element("th", { scope: "row", textContent: name }),
    element("td", { className: "number", textContent: typeof value === "number" ? value.toPrecision(4) : JSON.stringify(value) })));
  $("bars").replaceChildren(...bars, ...others);
  const shown = Object.keys(probabilities ?? {}).length, all = model.classes.length;
  $("note").textContent = (shown && shown < all ? `The ${shown} most probable of ${all} classes; ` : "") + `${milliseconds.toFixed(0)} ms`;
  $("prediction").hidden = false;
  $("empty").hidden = $("error").hidden = true;
}

const percent = (p) => `${(100 * p).toFixed(1)} %`;

function bar(name, p, chosen) {
  const filled = element("span");
  filled.style.width = percent(p).replace(" ", ""); // set by script: the content security policy forbids style attributes
  return element("tr", { className: chosen ? "chosen" : "" }, element("th", { scope: "row", textContent: name }),
    element("td", {}, element("meter-bar", {}, filled)), element("td", { className: "number", textContent: percent(p) }));
}

start().catch(() => showError("The server does not respond."));
