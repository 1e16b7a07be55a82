#include "sluice/base/telemetry.hpp"

// The page: one canvas that draws what the embedded Chrome trace holds, and a table computed from it. Wheel zooms, dragging
// moves, pointing shows a span. Nothing is loaded from anywhere.

namespace sluice {
namespace {

constexpr std::string_view kHead = R"html(<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Sluice timeline</title>
<style>
body{font:14px system-ui,sans-serif;margin:16px;color:#222;background:#fff}
h1{font-size:18px;margin:0 0 4px}p{margin:0 0 10px;color:#555}
canvas{border:1px solid #bbb;width:100%;display:block;cursor:grab}
#tip{min-height:1.4em;margin:6px 0;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;margin-top:8px;font-variant-numeric:tabular-nums}
td,th{padding:2px 10px;border-bottom:1px solid #ddd;text-align:right}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}
.key{display:inline-block;width:10px;height:10px;margin-right:6px}
</style></head><body><h1>Sluice timeline</h1><p id="title"></p>
<canvas id="view"></canvas><div id="tip">Wheel: zoom. Drag: move. Point at a span for its numbers.</div>
<table><thead><tr><th>op</th><th>resource</th><th>count</th><th>total us</th><th>mean us</th><th>longest us</th></tr></thead>
<tbody id="phases"></tbody></table>
<script type="application/json" id="trace">)html";

constexpr std::string_view kMiddle = R"html(</script><script type="application/json" id="name">)html";

constexpr std::string_view kTail = R"html(</script><script>
"use strict";
const events = JSON.parse(document.getElementById("trace").textContent).traceEvents;
document.getElementById("title").textContent = JSON.parse(document.getElementById("name").textContent);
const ranks = new Map(), threads = new Map();
for (const e of events) {
  if (e.name === "process_name") ranks.set(e.pid, e.args.name);
  if (e.name === "thread_name") threads.set(e.pid + "/" + e.tid, e.args.name);
}
const spans = events.filter(e => e.ph === "X");
const rowKeys = [...new Set(spans.map(e => e.pid + "/" + e.tid))].sort((a, b) => {
  const [pa, ta] = a.split("/").map(Number), [pb, tb] = b.split("/").map(Number);
  return pa - pb || ta - tb;
});
const rowOf = new Map(rowKeys.map((k, i) => [k, i]));
const names = [...new Set(spans.map(e => e.name))].sort();
const color = name => `hsl(${names.indexOf(name) * 360 / Math.max(1, names.length)} 60% 60%)`;
let begin = 0, end = 1;
for (const e of spans) end = Math.max(end, e.ts + e.dur);
if (spans.length) begin = Math.min(...spans.map(e => e.ts));
const full = [begin, end];
const canvas = document.getElementById("view"), ctx = canvas.getContext("2d");
const kLabel = 190, kRow = 22, kAxis = 20;
function draw() {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, height = kAxis + kRow * Math.max(1, rowKeys.length);
  canvas.style.height = height + "px";
  canvas.width = width * scale;
  canvas.height = height * scale;
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.font = "12px system-ui,sans-serif";
  ctx.textBaseline = "middle";
  const x = t => kLabel + (t - begin) / (end - begin) * (width - kLabel);
  const step = Math.pow(10, Math.floor(Math.log10((end - begin) / 4)));
  ctx.fillStyle = "#555";
  ctx.strokeStyle = "#e4e4e4";
  for (let t = Math.ceil(begin / step) * step; t < end; t += step) {
    ctx.beginPath(); ctx.moveTo(x(t), 0); ctx.lineTo(x(t), height); ctx.stroke();
    if ((width - kLabel) * step / (end - begin) > 60) ctx.fillText(t.toLocaleString() + " us", x(t) + 3, kAxis / 2);
  }
  for (const e of spans) {
    const left = x(e.ts), right = x(e.ts + e.dur);
    if (right < kLabel || left > width) continue;
    const top = kAxis + rowOf.get(e.pid + "/" + e.tid) * kRow + 2, from = Math.max(left, kLabel);
    ctx.fillStyle = color(e.name);
    ctx.fillRect(from, top, Math.max(1, right - from), kRow - 4);
    const text = e.name + (e.args.chunk === undefined ? "" : " " + e.args.chunk);
    if (right - from > ctx.measureText(text).width + 6) {
      ctx.fillStyle = "#111";
      ctx.fillText(text, from + 3, top + (kRow - 4) / 2);
    }
  }
  rowKeys.forEach((key, i) => {
    const top = kAxis + i * kRow;
    ctx.fillStyle = "#fff";
    ctx.fillRect(0, top, kLabel, kRow);
    ctx.fillStyle = "#222";
    ctx.fillText(ranks.get(Number(key.split("/")[0])) + ": " + threads.get(key), 4, top + kRow / 2);
  });
}
function timeAt(px) { return begin + (px - kLabel) / (canvas.clientWidth - kLabel) * (end - begin); }
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  const t = timeAt(e.offsetX), factor = e.deltaY > 0 ? 1.25 : 0.8;
  begin = t - (t - begin) * factor;
  end = t + (end - t) * factor;
  if (end - begin > full[1] - full[0]) [begin, end] = full;
  draw();
}, {passive: false});
let grabbed = null;
canvas.addEventListener("mousedown", e => { grabbed = timeAt(e.offsetX); });
window.addEventListener("mouseup", () => { grabbed = null; });
canvas.addEventListener("mousemove", e => {
  if (grabbed !== null) {
    const shift = grabbed - timeAt(e.offsetX);
    begin += shift;
    end += shift;
    draw();
    return;
  }
  const row = Math.floor((e.offsetY - kAxis) / kRow), t = timeAt(e.offsetX);
  const hit = spans.find(s => rowOf.get(s.pid + "/" + s.tid) === row && s.ts <= t && t <= s.ts + s.dur);
  if (hit) document.getElementById("tip").textContent =
    `${ranks.get(hit.pid)}, ${threads.get(hit.pid + "/" + hit.tid)}: ${hit.name}` +
    (hit.args.layer === undefined ? "" : `, layer ${hit.args.layer}`) +
    (hit.args.chunk === undefined ? "" : `, chunk ${hit.args.chunk}`) +
    `, from ${hit.ts.toFixed(1)} us, ${hit.dur.toFixed(1)} us`;
});
const phases = new Map();
for (const e of spans) {
  const resource = threads.get(e.pid + "/" + e.tid), key = e.name + "\n" + resource;
  const p = phases.get(key) || {name: e.name, resource, count: 0, total: 0, longest: 0};
  p.count++;
  p.total += e.dur;
  p.longest = Math.max(p.longest, e.dur);
  phases.set(key, p);
}
for (const p of [...phases.values()].sort((a, b) => b.total - a.total)) {
  const tr = document.getElementById("phases").insertRow();
  const cell = text => { tr.insertCell().textContent = text; };
  cell(p.name);
  const key = document.createElement("span");
  key.className = "key";
  key.style.background = color(p.name);
  tr.cells[0].prepend(key);
  cell(p.resource);
  cell(p.count);
  for (const v of [p.total, p.total / p.count, p.longest]) cell(v.toFixed(1));
}
window.addEventListener("resize", draw);
draw();
</script></body></html>
)html";

// JSON inside a script element: "</" would end it.
void append_escaped(std::string& out, std::string_view json) {
  for (std::size_t i = 0; i < json.size(); ++i) {
    if (json[i] == '<')
      out += "\\u003c";
    else
      out += json[i];
  }
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

}  // namespace

std::string timeline_page(const std::string& title, std::span<const std::string> events_of_ranks) {
  std::string out(kHead);
  append_escaped(out, chrome_trace(events_of_ranks));
  out += kMiddle;
  append_escaped(out, quoted(title));
  out += kTail;
  return out;
}

}  // namespace sluice
