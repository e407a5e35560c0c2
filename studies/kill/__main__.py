from studies.kill.study import app

app(prog_name="python -m studies.kill")
