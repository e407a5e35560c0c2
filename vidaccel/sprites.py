from vidaccel.worlds.sprites.__main__ import app

app(prog_name="python -m vidaccel.sprites")
