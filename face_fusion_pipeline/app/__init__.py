"""The web app `face-fusion app`.

`form` and `places` say what a user asks for and check it, `engine` generates, `results` writes the files, `session`
keeps users apart; none of them knows widgets. `page` lays the widgets out, `handlers` connects them, `server` listens.
"""
