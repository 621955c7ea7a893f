"""The units that answers are given in with all their spellings, and words after a number that are none. Tables alone.

A table reads `name = spelling spelling; name = …`. Symbols are as they are written, words without case and plural.
"""

from __future__ import annotations

_SYMBOLS = """
in = in; ft = ft; yd = yd; mi = mi; ly = ly; au = au AU; Å = Å; ha = ha; cc = cc; gal = gal; qt = qt; pt = pt;
kg = Kg KG kgs; km = Km KM kms; cm = CM cms; mm = MM mms; mL = ml ML; L = l; g = gm gms; dL = dl; t = t; lb = lb lbs;
oz = oz; s = sec secs; min = min mins; h = h hr hrs; d = d; wk = wk wks; mo = mo; yr = yr yrs; am = am AM a.m A.M;
pm = pm PM p.m P.M; rad = rad; degree = deg; celsius = degC; fahrenheit = degF; atm = atm; mmHg = mmHg; psi = psi;
dB = dB; mph = mph; km/h = kph kmh kmph; rpm = rpm; cd = cd; lm = lm; lx = lx; Bq = Bq; kB = KB kB; MB = MB; GB = GB;
kWh = kWh kwh; Hz = hz; M = M; VA = VA; amu = amu; sr = sr; Gy = Gy; Sv = Sv; pc = pc; dollar = $ USD; euro = € EUR;
 pound = £ GBP; yuan = RMB CNY; yen = JPY; ¥ = ¥; rupee = ₹ Rs INR;
cent = ¢ ct cts
"""
_WORDS = """
in = inch inches; ft = foot feet; yd = yard; mi = mile; µm = micron; ha = hectare; acre = acre; gal = gallon;
qt = quart; pt = pint; min = minute; h = hour; d = day; wk = week; mo = month; yr = year; t = ton tonne; lb = lb;
pound = pound; oz = ounce; rad = radian; degree = degree; celsius = celsius centigrade; fahrenheit = fahrenheit;
dollar = dollar; euro = euro; yuan = yuan; yen = yen; rupee = rupee; cent = cent; unit = unit; atm = atmosphere;
kΩ = kilohm; MΩ = megohm
"""
_CHINESE = """
mm = 毫米; cm = 厘米 公分; dm = 分米; m = 米; km = 千米 公里; nm = 纳米; µm = 微米; in = 英寸; ft = 英尺; mi = 英里;
ha = 公顷; L = 升; mL = 毫升; s = 秒; ms = 毫秒; min = 分钟; h = 小时 时; d = 天 日; wk = 周 星期; mo = 月 个月;
yr = 年; g = 克; kg = 千克 公斤; mg = 毫克; t = 吨; degree = 度; celsius = 摄氏度; fahrenheit = 华氏度; rad = 弧度;
A = 安 安培; V = 伏 伏特; W = 瓦 瓦特; kW = 千瓦; kWh = 千瓦时; J = 焦 焦耳; kJ = 千焦; N = 牛 牛顿; Pa = 帕 帕斯卡;
Hz = 赫 赫兹; Ω = 欧 欧姆; C = 库仑; mol = 摩尔; yuan = 元 人民币; yen = 日元; dollar = 美元; euro = 欧元; cent = 美分;
unit = 单位
"""
_METRIC = """
m = meter metre; g = gram gramme; s = second; A = ampere amp; V = volt; W = watt; J = joule; N = newton; C = coulomb;
F = farad; H = henry; T = tesla; K = kelvin; L = liter litre; Pa = pascal; Hz = hertz; Ω = ohm; Wb = weber;
mol = mole; eV = electronvolt; cal = calorie; bar = bar; Wh = watthour
"""
"""Each also with every prefix."""
_PREFIXES = {"k": "kilo", "M": "mega", "G": "giga", "m": "milli", "µ": "micro", "n": "nano", "p": "pico", "c": "centi",
             "d": "deci"}  # fmt: skip

POWERS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3}
"""Before a unit."""
POWERS_AFTER = {"squared": 2, "cubed": 3}
PER = frozenset(("per", "每", "/"))

DERIVED = {
    "N": {"kg": 1, "m": 1, "s": -2}, "J": {"kg": 1, "m": 2, "s": -2}, "W": {"kg": 1, "m": 2, "s": -3},
    "Pa": {"kg": 1, "m": -1, "s": -2}, "C": {"A": 1, "s": 1}, "V": {"kg": 1, "m": 2, "s": -3, "A": -1},
    "Ω": {"kg": 1, "m": 2, "s": -3, "A": -2}, "T": {"kg": 1, "s": -2, "A": -1}, "Hz": {"s": -1},
    "Wb": {"kg": 1, "m": 2, "s": -2, "A": -1}, "F": {"kg": -1, "m": -2, "s": 4, "A": 2},
    "H": {"kg": 1, "m": 2, "s": -2, "A": -2}, "mL": {"cm": 3}, "cc": {"cm": 3}, "L": {"dm": 3},
    "km/h": {"km": 1, "h": -1}, "mph": {"mi": 1, "h": -1},
}  # fmt: skip
"""Units that are products of others without a factor: N·m is J, mL is cm³."""

_CHANGING = (
    "hundred thousand million billion trillion dozen score half halves third thirds quarter quarters squared cubed "
    "factorial times plus minus over more less fewer and or to mod choose root pi percent point negative not none than "
    "from by divided multiplied power log exp sin cos tan cot sec csc sqrt frac infinity alpha beta gamma delta theta "
    "lambda sigma phi omega if when where for is are equals approximately between except remainder"
)
NO_UNITS = frozenset(_CHANGING.split())
"""Words after a number that change what it says; so do words on -th and -ths."""
CHINESE_NO_UNITS = frozenset("十百千万亿半分之点倍至到或和与加减乘除约成比负")
"""The same in Chinese, letter by letter."""


def _lines(table: str) -> dict[str, str]:
    entries = (entry.split("=") for entry in table.split(";"))
    return {spelling: name.strip() for name, spellings in entries for spelling in spellings.split()}


def _metric() -> tuple[dict[str, str], dict[str, str]]:
    symbols, words = {}, {}
    for word, symbol in _lines(_METRIC).items():
        symbols[symbol], words[word] = symbol, symbol
        for prefix, prefix_word in _PREFIXES.items():
            symbols[prefix + symbol] = words[prefix_word + word] = prefix + symbol
    return symbols, words


_metric_symbols, _metric_words = _metric()
SYMBOLS = _metric_symbols | _lines(_SYMBOLS)
"""Spelling → unit, with case."""
WORDS = _metric_words | _lines(_WORDS)
"""Word in the singular and in small letters → unit."""
CHINESE = _lines(_CHINESE)
