"""The page of `negtome-fast web`: images without and with guidance, from the same seeds.

`session` draws and needs no web server, `uploads` checks pictures, `outcome` describes what the
guidance did, and `page` puts a page of gradio around them.
"""
