"""How pages look: an evaluation's and a run's."""

STYLE = """:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; max-width: 76rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
small, .quiet { color: #5c6470; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1.2rem .4rem 0; border-bottom: 1px solid #e3e6ea; }
th { font-weight: 600; white-space: nowrap; }
td small { display: block; white-space: nowrap; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; margin: 0; }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
section { border-top: 1px solid #e3e6ea; padding: 1rem 0; scroll-margin-top: .5rem; }
section:target { background: #f4f8ff; }
section > p { margin: 0 0 .5rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; max-width: 60rem; }
figure { margin: 0; }
figcaption { font-weight: 600; }
img { width: 100%; height: auto; display: block; background: #eef0f3; }
.won { font-weight: 700; color: #14713d; }
a { color: #1a56c4; }"""
