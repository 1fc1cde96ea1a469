"use strict";
(() => {
  const EVERY_MS = 2000, LOST_MS = 10000;
  const REACHED = "a[href],summary,.scroll";
  const said = document.getElementById("live");
  const partsOf = (page) => [page.querySelector("header"), ...page.querySelectorAll("main > section")];
  const keyOf = (part) => {
    if (part.tagName === "HEADER") return "header";
    const title = part.querySelector("h2");
    return "section " + (title ? title.textContent : part.getAttribute("aria-label"));
  };
  const sent = new Map(partsOf(document).map((part) => [keyOf(part), part.outerHTML]));
  async function ask(name) {
    const reply = await fetch(name, { cache: "no-store", credentials: "omit", redirect: "error" });
    if (!reply.ok) throw new Error(String(reply.status));
    return reply;
  }
  function replace(old, fresh) {
    const titles = [...old.querySelectorAll("details[open] > summary")].map((one) => one.textContent);
    const at = [...old.querySelectorAll(REACHED)].indexOf(document.activeElement);
    old.replaceWith(fresh);
    fresh.querySelectorAll("details").forEach((one) => {
      one.open = titles.includes(one.querySelector("summary").textContent);
    });
    const reached = fresh.querySelectorAll(REACHED);
    if (at >= 0 && at < reached.length) reached[at].focus({ preventScroll: true });
  }
  async function renew() {
    const page = new DOMParser().parseFromString(await (await ask("./")).text(), "text/html");
    const old = new Map(partsOf(document).map((part) => [keyOf(part), part]));
    let before = said;
    partsOf(page).forEach((part) => {
      const key = keyOf(part), html = part.outerHTML, there = old.get(key);
      old.delete(key);
      if (!there) before.after(part);
      else if (sent.get(key) !== html) replace(there, part);
      sent.set(key, html);
      const now = there && there.isConnected ? there : part;
      if (now.tagName !== "HEADER") before = now;
    });
    old.forEach((part) => part.remove());
    document.title = page.title;
    document.getElementById("plots").textContent = page.getElementById("plots").textContent;
    said.dataset.version = page.getElementById("live").dataset.version;
    dispatchEvent(new Event("renewed"));
  }
  function say(words) {
    if (said.textContent !== words) said.textContent = words;
  }
  async function look() {
    let wait = EVERY_MS;
    try {
      if (!document.hidden) {
        const state = await (await ask("state.json")).json();
        if (String(state.version) !== said.dataset.version) await renew();
        say(state.words);
      }
    } catch {
      say("The server of this page does not answer. Shown is what it said last.");
      wait = LOST_MS;
    }
    setTimeout(look, wait);
  }
  setTimeout(look, EVERY_MS);
})();
