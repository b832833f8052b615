"""The look of a run's page: light and dark, wide and narrow, on paper."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --line: #e5e7eb; --paper: #fff; --panel: #f6f7f9; --one: #0f766e; --two: #7c3aed; --heat: #0f766e;
 --good: #0f766e; --bad: #b91c1c; --warn: #b45309; --best: #1d4ed8; --change: #7c3aed; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #333c4a; --paper: #12161d; --panel: #1b212b; --one: #5eead4; --two: #c4b5fd; --heat: #2dd4bf;
 --good: #5eead4; --bad: #fca5a5; --warn: #fbbf24; --best: #93c5fd; --change: #c4b5fd; --on: #06211e; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 1160px; margin: 2rem auto; padding: 0 1.1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .75rem; text-transform: uppercase; letter-spacing: .04em; color: var(--soft); margin: 0; font-weight: 600; }
p { margin: .2rem 0; } .soft, .advice { color: var(--soft); } .good { color: var(--good); } .bad, .open { color: var(--bad); } svg .soft { fill: var(--soft); } svg .head { fill: var(--ink); font-weight: 600; } svg .beside { fill: var(--soft); font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .8rem 0; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { overflow-x: auto; background: var(--panel); padding: .8rem; border-radius: 6px; } summary { cursor: pointer; }
table.numbers { border-collapse: collapse; font-variant-numeric: tabular-nums; } .numbers th, .numbers td { padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; } .numbers th[scope=row] { text-align: left; font-weight: 400; }
.findings { list-style: none; padding: 0; margin: 0; } .findings li { border-left: 4px solid var(--line); padding: .3rem .8rem; margin: .6rem 0; background: var(--panel); border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.findings .high { border-color: var(--bad); } .findings .medium { border-color: var(--warn); } .badge { font-size: .75rem; font-weight: 700; text-transform: uppercase; letter-spacing: .04em; } .high .badge { color: var(--bad); } .medium .badge { color: var(--warn); } .low .badge { color: var(--soft); }
figure { margin: 0; min-width: 0; } .two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 1.2rem; } .two svg { width: 100%; height: auto; display: block; }
.sites { display: flex; flex-wrap: wrap; gap: 1.2rem 2.2rem; margin-top: .8rem; } .sites figure { max-width: 100%; } .wide { overflow-x: auto; } .wide svg { display: block; }
article { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem 1.2rem; padding: .8rem 0; border-bottom: 1px solid var(--line); } article .asked { grid-column: 1 / -1; } article p { white-space: pre-wrap; overflow-wrap: anywhere; } article .is p { font-weight: 500; } article .asked p { color: var(--soft); }
.line { fill: none; stroke-width: 1.6; stroke: var(--ink); } .line.thin { stroke-width: 1; stroke: var(--soft); stroke-opacity: .55; } .line.pale { stroke-width: 1; stroke: var(--warn); stroke-opacity: .45; } .line.one { stroke: var(--one); stroke-width: 2; } .line.two { stroke: var(--two); stroke-width: 2; } .line.limit { stroke: var(--bad); stroke-dasharray: 6 4; }
.dot { fill: var(--ink); } .dot.one { fill: var(--one); } .dot.two { fill: var(--two); } .grid { stroke: var(--line); }
.mark { stroke-width: 1.6; stroke-dasharray: 4 3; stroke: var(--soft); } .mark.best { stroke: var(--best); } .mark.change { stroke: var(--change); stroke-width: 1; } .mark.trouble { stroke: var(--bad); stroke-dasharray: 2 2; }
.heat { fill: var(--heat); } .panel { fill: var(--panel); } .bar { fill: var(--one); pointer-events: none; } .cell { pointer-events: none; } .cell.off { fill: var(--ink); } .cell.on { fill: var(--on); }
svg text { font-family: system-ui, sans-serif; }
@media (max-width: 640px) { main { margin: 1rem auto; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } article { grid-template-columns: 1fr; } }
@media print { body { font-size: 11px; } main { max-width: none; margin: 0; } section { break-inside: auto; } figure, article, li, tr { break-inside: avoid; } h2 { break-after: avoid; } .wide { overflow: visible; } .wide svg { max-width: 100%; height: auto; }
 :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --panel: #fff; --one: #0f766e; --two: #7c3aed; --heat: #0f766e; --good: #0f766e; --bad: #b91c1c; --warn: #b45309; --best: #1d4ed8; --change: #7c3aed; --on: #fff; } .heat, .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
