"use strict";
const at = (id) => document.getElementById(id);
let newest = 0; // The answers to a picture that another has followed are dropped.

at("origin").textContent = location.origin;

function fail(text) {
  at("error").textContent = text;
  at("error").hidden = false;
}

function show(image, blob) {
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}

async function post(path, file) {
  const body = new FormData();
  body.append("image", file);
  const answer = await fetch(path, { method: "POST", body });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

function list(predictions) {
  at("classes").replaceChildren(
    ...predictions.map((each) => {
      const row = document.createElement("li");
      const name = document.createElement("span");
      const share = document.createElement("b");
      name.textContent = each.label ?? `class ${each.index}`;
      share.textContent = `${(100 * each.probability).toFixed(1)}%`;
      row.style.setProperty("--share", each.probability.toFixed(4));
      row.append(name, share);
      return row;
    }),
  );
}

async function classify(file) {
  const mine = ++newest;
  at("error").hidden = true;
  at("result").classList.add("busy");
  try {
    const start = performance.now();
    const { results } = await (await post("/predict", file)).json();
    if (mine !== newest) return;
    list(results[0].predictions);
    at("time").textContent = `${Math.round(performance.now() - start)} ms`;
    at("name").textContent = file.name;
    show(at("picture"), file);
    at("result").hidden = false;
    at("result").classList.remove("busy");
    if (!at("attention")) return;
    const picture = await (await post("/attention", file)).blob();
    if (mine === newest) show(at("attention"), picture);
  } catch (error) {
    if (mine !== newest) return;
    at("result").hidden = true;
    fail(error.message);
  }
}

function take(files) {
  if (files.length) classify(files[0]);
}

addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
addEventListener("dragleave", () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => take(event.clipboardData.files));
at("file").addEventListener("change", (event) => take(event.target.files));
