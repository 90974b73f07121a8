from fastseq.cli import app

app(prog_name="fastseq")
