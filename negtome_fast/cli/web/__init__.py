"""The page of `negtome-fast web`: images without and with guidance, from the same seeds.

`session` draws and needs no web server, `uploads` checks pictures and `upload_folder` keeps them,
`outcome` describes what the guidance did, `page` puts a page of gradio around them, and `gate` says
who may ask for it.
"""
