"""The results of provision/bench as a table and as a picture."""

import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MB = 1 << 20


def show(number, item):
    print(f"\n{number}. {item['title']}")
    for row in item["rows"]:
        if "text" in row:
            print(f"   {row['label']:<24} {row['text']}")
            continue
        latency = f"p50 {row['p50']:.2f} ms, p99 {row['p99']:.2f} ms; " if "p50" in row else ""
        print(f"   {row['label']:<24} {row['rate']:,.0f} a second (±{row['spread'] * 50:.0f} %); {latency}"
              "CPU µs each: " + ", ".join(f"{part} {value:.1f}" for part, value in row["cpu"].items())
              + "; at most MB: " + ", ".join(f"{part} {value / MB:.1f}" for part, value in row["memory"].items())
              + (f"; {row['errors']} FAILED" if row["errors"] else ""))


def table(items, begin="", between="  "):
    rows = [("", "measured", "goal", "")]
    for number, item in items.items():
        for one in item["goals"]:
            value, limit = (f"{figure:,.{2 if figure < 10 and not one['unit'] else 1 if figure < 100 else 0}f} {one['unit']}".strip()
                            for figure in (one["value"], one["limit"]))
            rows.append((f"{number}: {one['what']}", value, ("≥ " if one["least"] else "≤ ") + limit, "met" if one["met"] else "missed"))
    widths = [0 if begin else max(len(row[column]) for row in rows) for column in range(4)]
    lines = [begin + between.join(f"{text:<{width}}" for text, width in zip(row, widths)) + begin[::-1] for row in rows]
    return lines[:1] + (["|---|---|---|---|"] if begin else []) + lines[1:]


LIGHT = dict(ground="#ffffff", ink="#1f2328", faint="#d1d9e0", c0="#8c959f", c1="#0969da", c2="#1a7f37", c3="#bc4c00", c4="#8250df")
DARK = dict(ground="#0d1117", ink="#e6edf3", faint="#3d444d", c0="#7d8590", c1="#4493f8", c2="#3fb950", c3="#f0883e", c4="#ab7df8")


def plot(items):
    """Four pictures in one SVG, which follows the reader's light or dark."""
    style = lambda colors: "".join(f".{name}{{fill:{color};stroke:{color}}}" for name, color in colors.items())
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 620" font-family="system-ui,sans-serif" font-size="13">',
           f"<title>What Matinee costs</title><style>{style(LIGHT)}@media(prefers-color-scheme:dark){{{style(DARK)}}}"
           "text{stroke:none!important}path{fill:none!important;stroke-width:2}</style>",
           '<rect class="ground" width="900" height="620" rx="8"/>']
    text = lambda x, y, words, more="": out.append(f'<text class="ink" x="{x:.0f}" y="{y:.0f}" {more}>{words}</text>')
    bar = lambda x, y, width, height, color: out.append(
        f'<rect class="{color}" stroke-width="0" x="{x:.1f}" y="{y:.1f}" width="{max(0, width):.1f}" height="{height}"/>')
    line = lambda x1, y1, x2, y2, color="faint": out.append(f'<path class="{color}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
    heading = lambda x, y, words: text(x, y, words, 'font-weight="600" font-size="15"')

    def legend(x, y, names):
        for color, name in names:
            bar(x, y - 9, 10, 10, color)
            text(x + 14, y, name)
            x += 26 + 7 * len(name)

    heading(24, 34, "Share of the other side’s rate (line: the goal)")
    shown = [(number, one) for number, item in items.items() for one in item["goals"] if one["least"] and one["limit"] <= 1]
    scale = lambda share: min(share, 1.25) * 100
    for row, (number, one) in enumerate(shown):
        y = 50 + 28 * row
        text(24, y + 14, f"{number}: {one['what']}")
        bar(270, y, scale(one["value"]), 18, "c2" if one["met"] else "c3")
        text(276 + scale(max(one["value"], one["limit"])), y + 14, f"{one['value']:.2f}")
        line(270 + scale(one["limit"]), y - 3, 270 + scale(one["limit"]), y + 21, "ink")

    heading(474, 34, "CPU of one request, µs")
    colors = {"client": "c0", "gateway": "c1", "nginx": "c3", "inventory": "c2", "PostgreSQL": "c4"}
    costs = [(number, row) for number in (1, 2, 4) if number in items for row in items[number]["rows"]]
    most = max([sum(row["cpu"].values()) for _, row in costs] + [1])
    for place, (number, row) in enumerate(costs):
        x, y = 580, 50 + 32 * place
        text(474, y + 15, f"{number}: {row['label']}")
        for part, spent in row["cpu"].items():
            bar(x, y, spent / most * 250, 20, colors[part])
            x += spent / most * 250
        text(x + 6, y + 15, f"{sum(row['cpu'].values()):.0f}")
    legend(474, 262, [(color, part) for part, color in colors.items()])

    def curves(left, words, ticks, series):
        """Lines over a logarithmic x: series of (color, name, points)."""
        heading(left, 326, words)
        top = max([y for _, _, points in series for _, y in points] + [1]) * 1.1
        low, high = math.log(ticks[0]), math.log(ticks[-1])
        place = lambda x, y: (left + 40 + (math.log(x) - low) / (high - low) * 320, 540 - y / top * 190)
        for tick in ticks:
            text(place(tick, 0)[0], 560, f"{tick:,}".replace(",000", "k").replace("kk", "M"), 'text-anchor="middle"')
        for share in (0, 0.5, 1):
            line(left + 40, 540 - 190 * share, left + 370, 540 - 190 * share)
            text(left + 34, 544 - 190 * share, f"{top * share / 1e3:.1f}k", 'text-anchor="end"')
        for color, _, points in series:
            out.append(f'<path class="{color}" d="M' + "L".join("%.1f %.1f" % place(*point) for point in points) + '"/>')
            for point in points:
                out.append('<circle class="%s" cx="%.1f" cy="%.1f" r="3"/>' % (color, *place(*point)))
        legend(left, 592, [(color, name) for color, name, _ in series])

    if 5 in items:
        orders = items[5]["rows"]
        curves(24, "Confirmed orders a second, by connections", (1, 16, 64, 256), [
            (color, name, [(row["connections"], row["rate"]) for row in orders if row["label"].startswith(start)])
            for color, name, start in (("c1", "POST /api/billing", "gateway"), ("c0", "a bare publisher", "bare"))])
    if 7 in items:
        points = lambda key: [(one["x"], one["rate"]) for one in items[7][key]]
        curves(474, "GET /api/movies/:id a second, as things grow", (1, 10, 100, 1000, 10_000, 100_000, 1_000_000), [
            ("c1", "gateway, by connections", points("connections")), ("c2", "inventory, by movies", points("movies"))])
    return "\n".join(out) + "\n</svg>\n"


def publish(results):
    """Puts the picture beside this script and the table into docs/costs.md."""
    items = {int(number): item for number, item in results["items"].items()}
    (ROOT / "tests/bench/bench.svg").write_text(plot(items))
    readme = ROOT / "docs/costs.md"
    begin, marked, rest = readme.read_text().partition("<!-- provision/bench --plot -->\n")
    _, marked_end, end = rest.partition("<!-- end -->\n")
    if not (marked and marked_end):
        sys.exit("docs/costs.md has no place for the table")
    readme.write_text(begin + marked + f"\n{results['machine']}:\n\n" + "\n".join(table(items, "| ", " | ")) + "\n\n" + marked_end + end)
    print("tests/bench/bench.svg and docs/costs.md are up to date")
