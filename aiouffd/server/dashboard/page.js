"use strict";
// What the server tells is shown as text, never as markup: names come from others.

const KEPT = 120; // looks in the pictures
const ROWS = 50; // sessions that are shown at once
const MIB = 1 << 20;
const history = { faults: [], bytes_fetched: [], bytes_shared: [], in_flight: [] };
const maps = new Map(); // session -> what /residency said
let before = null;
const stuck = new Map(); // session -> looks without an answer of its source
const RECENT = 10; // seconds for which is told what was slow or has failed
const looks = []; // of these seconds
const reasons = new Map(); // session -> why a page could not be had last
const HAPPENINGS = 200; // that are shown
const CAUSES = { source: "its source", queue: "its turn", retry: "another try of its source", decompress: "decompressing", handler: "its handler" };
const RANKS = ["trouble", "hint", ""];

const at = (id) => document.getElementById(id);
const counted = (told, name) => told.statistics[name] ?? 0;
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

function duration(ns) {
    if (!ns) return "-";
    for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["µs", 1e3]])
        if (ns >= size) return `${number(ns / size)} ${unit}`;
    return `${ns} ns`;
}

function rate(now, old, name, seconds) {
    return old ? Math.max(counted(now, name) - counted(old, name), 0) / seconds : 0;
}

function draw(canvas, values, highest, fill) {
    const style = getComputedStyle(document.body);
    canvas.width = values.length;
    canvas.height = 100;
    const pen = canvas.getContext("2d");
    pen.fillStyle = style.getPropertyValue("--bar");
    values.forEach((value, index) => {
        if (fill) {
            pen.globalAlpha = value / 100;
            pen.fillRect(index, 0, 1, 100);
        } else {
            pen.fillRect(index, 100 - (100 * value) / highest, 1, 100);
        }
    });
}

function showRates(look, seconds) {
    for (const name of Object.keys(history)) {
        const value = name === "in_flight" ? counted(look, name) : rate(look, before, name, seconds);
        history[name].push(name.startsWith("bytes") ? value / MIB : value);
        while (history[name].length > KEPT) history[name].shift();
        const canvas = document.querySelector(`canvas[data-rate=${name}]`);
        const padded = [...Array(KEPT - history[name].length).fill(0), ...history[name]];
        draw(canvas, padded, Math.max(...padded, 1e-9), false);
    }
    at("faults").value = number(history.faults.at(-1));
    at("fetched").value = number(history.bytes_fetched.at(-1));
    at("shared").value = number(history.bytes_shared.at(-1));
    at("in_flight").value = number(history.in_flight.at(-1));
}

function trouble(session, past, now) {
    // Why it is slow, or what is wrong, in words. What it has said of late, the last time at the end, is `past`.
    const old = past.at(-1);
    const waits = counted(session, "in_flight") > 0 && old && counted(session, "bytes_fetched") === counted(old, "bytes_fetched");
    const looks = waits ? (stuck.get(session.name) ?? 0) + 1 : 0;
    stuck.set(session.name, looks);
    const grew = (name) => past.some((one) => counted(session, name) > counted(one, name));
    if (grew("source_errors")) return ["trouble", "its source fails", reasons.get(session.name)];
    if (grew("source_retries")) return ["trouble", "its source is asked again"];
    if (looks >= 3) return ["trouble", "its source does not answer"];
    if (grew("slowed")) return ["hint", "slowed by its limits"];
    if (session.slow.time > now - RECENT) return ["hint", `slow: waited ${duration(session.slow.took_ns)} for ${CAUSES[session.slow.cause] ?? session.slow.cause}`];
    return [session.state === "listening" ? "" : "hint", session.state];
}

function row(session, old, seconds, [kind, state, reason]) {
    const line = document.createElement("tr");
    line.dataset.session = session.name;
    const map = maps.get(session.name);
    const cells = [
        session.name || "(command line)", state, session.clients, null,
        number(rate(session, old, "faults", seconds)), number(rate(session, old, "bytes_fetched", seconds) / MIB),
        duration(counted(session, "latency_p50_ns")), duration(counted(session, "latency_p99_ns")),
        counted(session, "in_flight"), counted(session, "pages_poisoned"), counted(session, "slowed"), session.rejected,
    ];
    for (const value of cells) line.insertCell().textContent = value ?? "";
    const source = line.cells[0].appendChild(document.createElement("small"));
    source.textContent = source.title = session.source;
    line.cells[1].className = kind;
    if (reason) {
        const why = line.cells[1].appendChild(document.createElement("small"));
        why.textContent = why.title = reason;
    }
    if (counted(session, "pages_poisoned")) line.cells[9].className = "trouble";
    if (session.clients && map && map.clients) {
        const canvas = document.createElement("canvas");
        const share = map.cells.reduce((sum, cell) => sum + cell, 0) / map.cells.length;
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${number(share)} % of the source's range is there`);
        canvas.title = canvas.getAttribute("aria-label");
        line.cells[3].replaceChildren(canvas);
        draw(canvas, map.cells, 100, true);
    }
    return line;
}

function showSessions(look, seconds) {
    const known = new Map((before?.sessions ?? []).map((session) => [session.name, session]));
    const wanted = at("wanted").value;
    const past = new Map(look.sessions.map((session) => [session.name, []]));
    for (const one of looks) for (const session of one.sessions) past.get(session.name)?.push(session);
    const states = new Map(look.sessions.map((session) => [session, trouble(session, past.get(session.name), look.time)]));
    const rank = (session) => RANKS.indexOf(states.get(session)[0]);
    const busy = (session) => rate(session, known.get(session.name), "faults", seconds);
    const shown = look.sessions.filter((session) => session.name.includes(wanted));
    shown.sort((one, other) => rank(one) - rank(other) || busy(other) - busy(one));
    const rows = shown.slice(0, ROWS).map((session) => row(session, known.get(session.name), seconds, states.get(session)));
    at("sessions").replaceChildren(...rows);
    const all = look.sessions.length + look.left_out;
    at("count").textContent = shown.length > ROWS ? `${ROWS} of ${all}, those in trouble first, then the busiest` : `${all}`;
    return shown.slice(0, ROWS).filter((session) => session.clients).map((session) => session.name);
}

function showLatency(buckets) {
    const first = buckets.findIndex((count) => count);
    const last = buckets.findLastIndex((count) => count);
    const highest = Math.max(...buckets);
    const lines = [];
    for (let bits = first; first >= 0 && bits <= last; bits++) {
        const line = document.createElement("div");
        const [upto, meter, count] = ["span", "meter", "span"].map((name) => document.createElement(name));
        upto.textContent = `to ${duration(2 ** bits)}`;
        meter.max = highest;
        meter.value = buckets[bits];
        count.textContent = number(buckets[bits]);
        line.append(upto, meter, count);
        lines.push(line);
    }
    at("latency").replaceChildren(...lines);
}

function showRestarts(look) {
    const lines = look.restarts.map((text) => {
        const line = document.createElement("li");
        line.textContent = text;
        return line;
    });
    at("restarts").replaceChildren(...lines);
}

function showHappening(happening) {
    const item = document.createElement("li");
    const details = Object.entries(happening.details).map(([name, value]) => name.endsWith("_ns") ? `${name.slice(0, -3)}=${duration(value)}` : `${name}=${value}`).join(" ");
    const when = new Date(1000 * happening.time).toLocaleTimeString();
    item.textContent = `${when} ${happening.kind} ${happening.session} ${details}`;
    item.value = happening.number;
    if (/failed|rejected|died/.test(happening.kind)) item.className = "trouble";
    if (/slow/.test(happening.kind)) item.className = "hint";
    at("happenings").prepend(item);
    if (happening.kind === "client.failed") reasons.set(happening.session, happening.details.reason);
    while (at("happenings").childElementCount > HAPPENINGS) // of the many slow faults first
        ([...at("happenings").querySelectorAll(".hint")].at(-1) ?? at("happenings").lastElementChild).remove();
    const troubles = at("happenings").querySelectorAll(".trouble").length;
    at("outages").textContent = troubles ? `failures among these: ${troubles}` : "";
}

async function lookAtMemory(names) {
    for (const name of names) {
        const answer = await fetch(`residency?session=${encodeURIComponent(name)}`);
        if (answer.ok) maps.set(name, await answer.json());
    }
}

let isLooking = false;

function showLook(look) {
    const seconds = before ? Math.max(look.time - before.time, 0.1) : 1;
    const restarted = counted(look, "restarts");
    const replaced = restarted ? `, its worker was replaced ${restarted === 1 ? "once" : `${restarted} times`}` : "";
    at("version").textContent = `${look.version}, pager ${look.pager.join(" ")}${replaced}`;
    showRates(look, seconds);
    const names = showSessions(look, seconds);
    showRestarts(look);
    showLatency(look.latency);
    before = look;
    looks.push(look);
    while (looks[0].time < look.time - RECENT) looks.shift();
    if (!isLooking) {
        isLooking = true;
        lookAtMemory(names).catch(() => {}).finally(() => { isLooking = false; });
    }
}

function say(state, text) {
    at("state").dataset.state = state;
    at("state").textContent = text;
}

const live = new EventSource("live");
live.addEventListener("open", () => { say("live", "live"); at("happenings").replaceChildren(); });
live.addEventListener("error", () => say("lost", "the server does not answer; trying again"));
live.addEventListener("look", (event) => showLook(JSON.parse(event.data)));
live.addEventListener("happening", (event) => showHappening(JSON.parse(event.data)));
