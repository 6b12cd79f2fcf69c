"""The style of the page: one column, dark or light as the reader's system has it, tables that scroll when narrow."""

STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--dim:#5b616b;--paper:#fff;--card:#f4f5f7;--line:#d9dce1;
--bad:#b3261e;--warn:#8a5a00;--good:#1b6e3c}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#a0a6b0;--paper:#15171b;--card:#1f2228;--line:#363b44;
--bad:#ff8a80;--warn:#ffc766;--good:#7fd8a0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 40px}
h1{margin:0;font-size:26px}
h2{margin:28px 0 8px;font-size:17px}
.lead,footer{color:var(--dim)}
.lead{margin:2px 0 18px}
footer{margin-top:36px;padding-top:10px;border-top:1px solid var(--line);font-size:13px}
.verdict{padding:12px 16px;background:var(--card);border-left:5px solid var(--dim);border-radius:4px}
.verdict strong{font-size:20px}
.verdict span{color:var(--dim)}
.verdict p{margin:4px 0 0}
.bad{border-color:var(--bad)}.bad strong{color:var(--bad)}
.warn{border-color:var(--warn)}.warn strong{color:var(--warn)}
.good{border-color:var(--good)}.good strong{color:var(--good)}
dl{display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:3px 18px;margin:14px 0}
dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
.pictures{display:flex;flex-wrap:wrap;gap:14px;margin:18px 0}
figure{margin:0;width:200px}
figure img{width:100%;image-rendering:pixelated;border:1px solid var(--line);border-radius:3px;display:block}
figcaption{font-size:12px;color:var(--dim);margin-top:4px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;white-space:nowrap}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:600}
.number{text-align:right;font-variant-numeric:tabular-nums}
ul{margin:0;padding-left:20px}
"""
