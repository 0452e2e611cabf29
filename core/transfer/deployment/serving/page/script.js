"use strict";

const $ = (id) => document.getElementById(id);
let models = [], most = {}, model = null;
let given = {}; // what each input holds: a File, or a function that gives a text
let asked = 0; // of several questions only the last one's answer is shown

async function start() {
  const answer = await fetch("models");
  ({ models, most_bytes: most } = await answer.json());
  for (const { name } of models) $("model").add(new Option(name, name));
  $("choice").hidden = models.length < 2;
  $("model").onchange = () => show(models[$("model").selectedIndex]);
  $("form").onsubmit = (event) => { event.preventDefault(); predict(); };
  show(models[0]);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(chosen) {
  model = chosen;
  given = {};
  asked += 1;
  $("title").textContent = model.name;
  const kinds = Object.values(model.inputs);
  $("hint").textContent = kinds.some(isText) ? "or Ctrl + Enter" : "";
  $("inputs").replaceChildren(...Object.entries(model.inputs).map(([name, kind]) => (isText(kind) ? typed : dropped)(name, kind)));
  reset();
}

const isText = (kind) => kind.startsWith("text/");
const named = (name, field) => element("label", { className: "input" }, element("span", { className: "name", textContent: name }), field);

function typed(name) {
  const area = element("textarea", { id: `input-${name}`, placeholder: "Type or paste a text", spellcheck: false });
  area.onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) predict(); };
  given[name] = () => area.value;
  return named(name, area);
}

function dropped(name, kind) {
  const what = kind.startsWith("image/") ? "picture" : "file";
  const chooser = element("input", { type: "file", accept: kind, id: `input-${name}` });
  const said = element("span", { textContent: `Drop a ${what} here, paste one, or click to choose` });
  const area = element("span", { className: "drop" }, said, chooser);
  const take = (file) => {
    if (!file) return;
    given[name] = file;
    area.querySelector("img")?.remove();
    said.textContent = file.name;
    if (kind.startsWith("image/")) {
      const picture = element("img", { alt: "", src: URL.createObjectURL(file) });
      picture.onload = () => URL.revokeObjectURL(picture.src);
      picture.onerror = () => { URL.revokeObjectURL(picture.src); picture.remove(); };
      area.prepend(picture);
    }
    if (Object.values(model.inputs).length === 1) predict();
  };
  chooser.onchange = () => { take(chooser.files[0]); chooser.value = ""; };
  area.ondragover = (event) => { event.preventDefault(); area.classList.add("over"); };
  area.ondragleave = () => area.classList.remove("over");
  area.ondrop = (event) => { event.preventDefault(); area.classList.remove("over"); take(event.dataTransfer.files[0]); };
  area.take = take;
  return named(name, area);
}

document.onpaste = (event) => {
  const area = document.querySelector(".drop");
  if (area && event.clipboardData.files.length) area.take(event.clipboardData.files[0]);
};
// A file dropped beside its place must not replace the page.
document.ondragover = document.ondrop = (event) => event.preventDefault();

function reset() {
  $("empty").hidden = false;
  $("error").hidden = $("answer").hidden = true;
}

function refuse(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  $("empty").hidden = $("answer").hidden = true;
}

async function predict() {
  const form = new FormData();
  for (const name of Object.keys(model.inputs)) {
    const value = typeof given[name] === "function" ? given[name]() : given[name];
    if (!value || (typeof value === "string" && !value.trim())) return refuse(`Give the ${name} first.`);
    if (value.size > most.body) return refuse(`${value.name} is too large: ${(most.body / 2 ** 20).toFixed(1)} MiB are the most.`);
    form.append(name, value);
  }
  const question = (asked += 1);
  const began = performance.now();
  $("ask").disabled = true;
  try {
    const answer = await fetch(`models/${model.name}/predict`, { method: "POST", body: form });
    const said = await answer.json().catch(() => ({ detail: answer.statusText }));
    if (question !== asked) return;
    if (answer.ok) tell(said, performance.now() - began);
    else refuse(typeof said.detail === "string" ? said.detail : "The request was refused.");
  } catch {
    if (question === asked) refuse("The server does not answer.");
  } finally {
    $("ask").disabled = false;
  }
}

function tell(answer, milliseconds) {
  const { label, labels, probability, probabilities, ...rest } = answer;
  const chosen = labels ?? (label === undefined ? [] : [label]);
  $("label").replaceChildren(labels && !labels.length ? "no label" : chosen.join(", "));
  if (probability !== undefined) $("label").append(element("small", { textContent: percent(probability) }));
  $("label").hidden = label === undefined && labels === undefined;
  const bars = Object.entries(probabilities ?? {}).sort((a, b) => b[1] - a[1]).map(([name, p]) => bar(name, p, chosen.includes(name)));
  const others = Object.entries(rest).map(([name, value]) => element("tr", {}, element("th", { scope: "row", textContent: name }),
    element("td", { className: "number", textContent: typeof value === "number" ? value.toPrecision(4) : JSON.stringify(value) })));
  $("bars").replaceChildren(...bars, ...others);
  const shown = Object.keys(probabilities ?? {}).length, all = model.classes.length;
  $("took").textContent = (shown && shown < all ? `the ${shown} most probable of ${all} classes, ` : "") + `${milliseconds.toFixed(0)} ms`;
  $("answer").hidden = false;
  $("empty").hidden = $("error").hidden = true;
}

const percent = (p) => `${(100 * p).toFixed(1)} %`;

function bar(name, p, chosen) {
  const filled = element("span");
  filled.style.width = percent(p).replace(" ", ""); // by script: the page's policy allows no style attribute
  return element("tr", { className: chosen ? "chosen" : "" }, element("th", { scope: "row", textContent: name }),
    element("td", {}, element("meter-bar", {}, filled)), element("td", { className: "number", textContent: percent(p) }));
}

start().catch(() => refuse("The server does not answer."));
