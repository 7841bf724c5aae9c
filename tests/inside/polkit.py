"""A stand-in for polkitd on a private bus. It allows the actions that a file lists, and records its
answers.

    polkit.py ALLOWED ASKED

Like polkitd it allows everything to root. To other users it allows the actions of org.libvirt.api
that ALLOWED lists, one a line. It reads the file again for each question. ASKED gets a line with
the uid, the action and the answer for each question.
"""

import sys

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib  # noqa: E402

ROOT = 0
INTERFACE = """
<node>
  <interface name="org.freedesktop.PolicyKit1.Authority">
    <method name="CheckAuthorization">
      <arg type="(sa{sv})" direction="in"/>
      <arg type="s" direction="in"/>
      <arg type="a{ss}" direction="in"/>
      <arg type="u" direction="in"/>
      <arg type="s" direction="in"/>
      <arg type="(bba{ss})" direction="out"/>
    </method>
  </interface>
</node>
"""
allowed_file, asked_file = sys.argv[1:]


def answer(_connection, _sender, _path, _interface, _method, parameters, invocation):
    (_kind, subject), action, *_ = parameters.unpack()
    uid = subject["uid"]
    with open(allowed_file, encoding="ascii") as file:
        allowed = uid == ROOT or action.removeprefix("org.libvirt.api.") in file.read().split()
    with open(asked_file, "a", encoding="ascii") as file:
        print(uid, action, "yes" if allowed else "no", file=file)
    invocation.return_value(GLib.Variant("((bba{ss}))", ((allowed, False, {}),)))


def acquired(connection, _name):
    interface = Gio.DBusNodeInfo.new_for_xml(INTERFACE).interfaces[0]
    connection.register_object("/org/freedesktop/PolicyKit1/Authority", interface, answer)


Gio.bus_own_name(Gio.BusType.SYSTEM, "org.freedesktop.PolicyKit1", Gio.BusNameOwnerFlags.NONE,
                 acquired, lambda *_: print("ready", flush=True),
                 lambda *_: sys.exit("the bus is lost"))
GLib.MainLoop().run()
