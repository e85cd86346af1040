"""The beginning of every page that is written: its colours, by day and by night, and what stands before its styles."""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$TITLE</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #555; --line: #ccc; --faint: #e4e4e4;
  --lit: #f2f2f2; --gates: #d55e00; --warm: #fdf3ec; --asked: #dcebf7; --wrong: #a33b00; --link: #0b5394;
  --retained: 0, 114, 178; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e6e6e6; --soft: #a8adb3; --line: #4a4f55; --faint: #2c3035;
    --lit: #262a2f; --gates: #e8772e; --warm: #2d221a; --asked: #1e3448; --wrong: #ff9a66; --link: #8ab8e8;
    --retained: 64, 156, 222; }
}
body { color: var(--ink); background: var(--paper); }
"""
