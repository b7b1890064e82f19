"use strict";
// One page, no library: consent, trials, thanks. All state is on the server; a reload goes on where it was.

const TEXT = {
  en: {
    other: "中文", realism: "Which picture looks more like a real photograph?",
    truth: "Which picture shows the reference garment more truly?",
    opinion: "How much does this picture look like a real photograph?",
    left: "Left", right: "Right", tie: "No difference", bad: "not at all", good: "entirely",
    reference: "Reference garment", agree: "I agree, start", thanks: "Thank you!",
    done: "All your answers are stored. You can close this page.",
    consent: (n) => `You will see ${n} screens with pictures of clothes and say which looks better; it takes about
      ${Math.max(1, Math.ceil(n * 6 / 60))} minutes. Please use a large screen if you can, and look at the cloth closely:
      point at a picture (or hold a finger on it) for the magnifier.`,
    privacy: `We store your answers, how long each took and the language, under a number. No name, no address, no
      cookies. You can stop at any time and come back by the same link.`,
    question: "Do you agree to take part?", zoom: { whole: "Zoom: 100 %", fit: "Zoom: fit" },
    keys: "Keys: ← left, ↓ no difference (2 where ↓ scrolls the page), → right, Z zoom", keysOpinion: "Keys: 1 to 5, Z zoom",
    error: "No connection. Your answer is not stored yet.", refused: (why) => `Your answer is not stored yet: ${why}.`,
    retry: "Try again", gone: "This link is not valid.",
    prompt: "Description: ",
  },
  zh: {
    other: "English", realism: "哪一张更像真实拍摄的照片?", truth: "哪一张更忠实地呈现了参考服装?",
    opinion: "这张图在多大程度上像真实拍摄的照片?",
    left: "左图", right: "右图", tie: "没有差别", bad: "完全不像", good: "完全像",
    reference: "参考服装", agree: "我同意,开始", thanks: "谢谢您!", done: "您的回答已全部保存,可以关闭本页。",
    consent: (n) => `您将看到 ${n} 组服装图片,并选出更好的一张,大约需要 ${Math.max(1, Math.ceil(n * 6 / 60))} 分钟。
      请尽量使用大屏幕,并仔细观察面料:将指针移到图片上(或用手指按住)可使用放大镜。`,
    privacy: "我们只以编号保存您的回答、每题用时和语言,不记录姓名、地址,也不使用 Cookie。您可以随时停止,并通过同一链接继续。",
    question: "您同意参加吗?", zoom: { whole: "缩放:100 %", fit: "缩放:适应" },
    keys: "按键:← 左,↓ 没有差别(页面可滚动时请按 2),→ 右,Z 缩放", keysOpinion: "按键:1 到 5,Z 缩放",
    error: "没有连接,您的回答尚未保存。", refused: (why) => `您的回答尚未保存:${why}。`, retry: "重试", gone: "此链接无效。", prompt: "描述:",
  },
};

const token = location.pathname.split("/").pop();
const main = document.getElementById("main");
const lens = document.getElementById("lens");
let language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";
let zoom = "whole"; // whole: one image pixel is a whole number of screen pixels; fit: as wide as there is room
let current = null; // what the server said last
let shownAt = 0;
let busy = false;

const t = (key) => TEXT[language][key];

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") node.onclick = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

async function send(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json", "X-Study": "1" }, body: JSON.stringify(body),
  };
  const answer = await fetch(`../api/${token}/${path}`, options); // relative: the study may lie under any path
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(told.error || String(answer.status)), { status: answer.status });
  }
  return answer.json();
}

// Sends until the server has said that it is stored: a vote is never dropped silently.
async function go(path, body) {
  if (busy) return;
  busy = true;
  document.querySelectorAll(".answers button").forEach((button) => { button.disabled = true; });
  try {
    current = await send(path, body);
    if (path === "next" && current.language) language = current.language; // chosen before a reload
    busy = false;
    await show();
  } catch (error) {
    busy = false;
    document.querySelectorAll(".error").forEach((node) => node.remove());
    main.append(element("p", { class: "error", role: "alert" },
      error.status === 404 ? t("gone") : error.status ? t("refused")(error.message) : t("error"), " ",
      element("button", { type: "button", onclick: () => go(path, body) }, t("retry"))));
  }
}

function vote(answer) {
  if (!shownAt || busy) return;
  go("vote", { trial: current.trial, answer, ms: Math.round(performance.now() - shownAt) });
}

function picture(url, kind, caption) {
  const image = element("img", { src: url, alt: caption, draggable: "false" });
  const figure = element("figure", { class: kind }, image, element("figcaption", {}, caption));
  image.addEventListener("pointermove", magnify);
  image.addEventListener("pointerdown", magnify);
  for (const name of ["pointerleave", "pointerup", "pointercancel"]) image.addEventListener(name, () => { lens.hidden = true; });
  image.addEventListener("contextmenu", (event) => event.preventDefault());
  return figure;
}

// A picture pixel takes a whole number of screen pixels, so that nothing is smoothed. Where there is no room for one each,
// the picture is as wide as there is room: nobody votes on a part of it, and the magnifier shows its pixels.
function resize() {
  let whole = false;
  document.querySelectorAll("main img").forEach((image) => {
    const natural = image.naturalWidth;
    if (!natural) return;
    const columns = document.querySelectorAll("figure.picture").length || 1;
    const reference = image.parentElement.classList.contains("reference");
    const phone = window.innerWidth <= 640;
    const side = reference ? 0.22 : (document.querySelector("figure.reference") && !phone ? 0.74 : 1) / columns;
    const width = Math.min(main.clientWidth - 40, 1360) * (reference && phone ? 0.4 : side) - 12;
    const tall = window.innerHeight * (phone ? 0.45 : 0.62) * natural / image.naturalHeight;
    const room = Math.min(width, tall);
    const ratio = window.devicePixelRatio || 1;
    const factor = zoom === "whole" ? Math.floor(room * ratio / natural) : 0;
    image.classList.toggle("whole", factor > 0);
    image.style.width = `${factor > 0 ? natural * factor / ratio : room}px`;
    if (factor > 0 && !reference) whole = true;
  });
  document.getElementById("zoom").textContent = t("zoom")[whole ? "whole" : "fit"];
}

function magnify(event) {
  if (event.pointerType === "mouse" ? false : event.type === "pointermove" && event.buttons === 0) return;
  const image = event.target;
  const box = image.getBoundingClientRect();
  const scale = Math.max(3, 4 * image.naturalWidth / box.width / (window.devicePixelRatio || 1));
  const x = event.clientX - box.left;
  const y = event.clientY - box.top;
  const touch = event.pointerType !== "mouse";
  lens.hidden = false;
  lens.style.left = `${Math.min(Math.max(event.clientX - 110, 0), window.innerWidth - 220)}px`;
  lens.style.top = `${Math.max(event.clientY - (touch ? 260 : 110), 0)}px`;
  lens.style.backgroundImage = `url("${image.currentSrc}")`;
  lens.style.backgroundSize = `${box.width * scale}px ${box.height * scale}px`;
  lens.style.backgroundPosition = `${110 - x * scale}px ${110 - y * scale}px`;
}

function answers() {
  const button = (answer, label, key) =>
    element("button", { type: "button", "data-answer": answer, onclick: () => vote(answer) }, label, element("kbd", {}, key));
  if (current.kind === "opinion") return ["1", "2", "3", "4", "5"].map((n) => button(n, n, n));
  return [button("left", t("left"), "←"), button("tie", t("tie"), "↓"), button("right", t("right"), "→")];
}

async function showTrial() {
  const opinion = current.kind === "opinion";
  const pictures = [
    current.reference && picture(current.reference, "reference", t("reference")),
    picture(current.left, "picture", opinion ? "" : t("left")),
    opinion ? null : picture(current.right, "picture", t("right")),
  ];
  const row = element("div", { class: "pictures" }, ...pictures);
  const buttons = element("div", { class: "answers" }, ...answers());
  buttons.querySelectorAll("button").forEach((button) => { button.disabled = true; });
  main.replaceChildren(
    element("h1", {}, t(opinion ? "opinion" : current.question)),
    element("p", { class: "prompt" }, t("prompt"), current.prompt),
    row, buttons,
    ...(opinion ? [element("div", { class: "scale" }, element("span", {}, `1 = ${t("bad")}`), element("span", {}, `5 = ${t("good")}`))] : []),
    element("p", { class: "hint keys" }, t(opinion ? "keysOpinion" : "keys")),
  );
  shownAt = 0;
  const shown = current;
  const images = [...row.querySelectorAll("img")];
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch (error) {
    main.append(element("p", { class: "error", role: "alert" }, t("error"), " ",
      element("button", { type: "button", onclick: showTrial }, t("retry"))));
    return;
  }
  if (shown !== current) return;
  resize();
  buttons.querySelectorAll("button").forEach((button) => { button.disabled = false; });
  shownAt = performance.now(); // time counts from when there is something to see
}

async function show() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.getElementById("language").textContent = t("other");
  document.getElementById("zoom").textContent = t("zoom")[zoom];
  lens.hidden = true;
  const trial = current && current.state === "trial";
  document.getElementById("zoom").hidden = !trial;
  if (!current) return;
  document.title = current.title;
  const progress = document.getElementById("progress");
  progress.value = trial ? (current.number - 1) / current.total : current.state === "done" ? 1 : 0;
  document.getElementById("count").textContent = trial ? `${current.number} / ${current.total}` : "";
  if (trial) {
    await showTrial();
  } else if (current.state === "done") {
    main.replaceChildren(element("div", { class: "text", id: "thanks" }, element("h1", {}, t("thanks")), element("p", {}, t("done"))));
  } else {
    main.replaceChildren(element("div", { class: "text" },
      element("h1", {}, current.title), element("p", {}, t("consent")(current.total)), element("p", {}, t("privacy")),
      element("p", {}, t("question")),
      element("button", { type: "button", id: "agree", onclick: () => go("consent", { language }) }, t("agree"))));
  }
}

document.getElementById("language").onclick = () => {
  language = language === "en" ? "zh" : "en";
  // Kept for a reload, which is all that is lost if it does not arrive; before consent, consent itself keeps it.
  if (current && current.state !== "consent") send("consent", { language }).catch(() => {});
  show();
};
function toggleZoom() { zoom = zoom === "whole" ? "fit" : "whole"; resize(); }
document.getElementById("zoom").onclick = toggleZoom;
window.addEventListener("resize", resize);
const scrolls = () => document.documentElement.scrollHeight > window.innerHeight;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !current || current.state !== "trial") return;
  if (event.key === "z" || event.key === "Z") { toggleZoom(); return; }
  const keys = current.kind === "opinion"
    ? { 1: "1", 2: "2", 3: "3", 4: "4", 5: "5" }
    : { ArrowLeft: "left", ArrowDown: "tie", ArrowRight: "right", 1: "left", 2: "tie", 3: "right" };
  if (event.key === "ArrowDown" && scrolls()) return; // there it scrolls, and 2 votes
  if (keys[event.key]) { event.preventDefault(); vote(keys[event.key]); }
});
go("next");
