"""Calls libvirt's public functions on one connection and its one domain, and prints each answer on
a line.

    calls.py URI DOMAIN DIRECTORY

None of the calls concerns instant snapshots. For results that vary (times, counters, memory) only
the type is printed.
"""

import itertools
import json
import re
import sys

import libvirt
import libvirt_qemu

libvirt.registerErrorHandler(lambda *_: None, None)
uri, name, directory = sys.argv[1:]
conn = libvirt.open(uri)
dom = conn.lookupByName(name)
count = 0


def plain(value):
    """A result in JSON's types, with objects replaced by their names."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    for method in ("getName", "name"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def kind(value):
    """The part of a varying result that stays the same."""
    if isinstance(value, dict):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [type(entry).__name__ for entry in value]
    return type(value).__name__


def call(what, body, show=plain):
    global count
    count += 1
    try:
        answer = show(body())
    except libvirt.libvirtError as error:
        # Every field of the error that the client gets.
        answer = {
            "code": error.get_error_code(), "domain": error.get_error_domain(),
            "text": error.get_error_message(), "level": error.get_error_level(),
            "str1": error.get_str1(), "str2": error.get_str2(), "str3": error.get_str3(),
            "int1": error.get_int1(), "int2": error.get_int2()
        }
    print(json.dumps([what, answer]))


# Calls on the connection.
for method in ("getType", "getVersion", "getLibVersion", "getURI", "isAlive", "isEncrypted",
               "isSecure", "numOfDomains", "numOfDefinedDomains", "listDomainsID",
               "listDefinedDomains", "getHostname", "getSysinfo", "listNetworks",
               "listStoragePools", "listInterfaces", "listSecrets", "listNWFilters",
               "numOfNetworks", "numOfStoragePools", "numOfSecrets", "getCPUMap"):
    call(method, getattr(conn, method))
# Each daemon generates a host UUID of its own.
call("getCapabilities", conn.getCapabilities,
     lambda xml: re.sub("<uuid>[^<]*</uuid>", "<uuid/>", xml, count=1))
for method in ("getInfo", "getFreeMemory", "getMemoryStats", "getCellsFreeMemory"):
    args = {"getMemoryStats": (-1,), "getCellsFreeMemory": (0, 1)}.get(method, ())
    call(method, lambda: getattr(conn, method)(*args), kind)
for bit in range(16):
    call(f"listAllDomains {1 << bit:#x}", lambda: conn.listAllDomains(1 << bit))
for machine in ("pc", "q35", "nonsense"):
    call(f"getDomainCapabilities {machine}",
         lambda: conn.getDomainCapabilities(None, "x86_64", machine, "qemu"))
call("getMaxVcpus", lambda: conn.getMaxVcpus("qemu"))
call("getCPUModelNames", lambda: conn.getCPUModelNames("x86_64"))
for key in ("none", "", name):
    call(f"lookupByName {key}", lambda: conn.lookupByName(key))
for number in (0, 1, 4711):
    call(f"lookupByID {number}", lambda: conn.lookupByID(number))
call("lookupByUUIDString", lambda: conn.lookupByUUIDString("00000000-0000-0000-0000-000000000000"))
for xml in ("", "<domain/>", "<domain type='qemu'><name>x</name></domain>", "nonsense"):
    call(f"defineXML {xml}", lambda: conn.defineXML(xml))
    call(f"createXML {xml}", lambda: conn.createXML(xml, 0))
    call(f"compareCPU {xml}", lambda: conn.compareCPU(xml, 0))
    call(f"domainXMLFromNative {xml}", lambda: conn.domainXMLFromNative("qemu-argv", xml, 0))
call("saveImageGetXMLDesc", lambda: conn.saveImageGetXMLDesc(f"{directory}/none", 0))
call("restore", lambda: conn.restore(f"{directory}/none"))

# Calls on the domain.
for method in ("name", "UUIDString", "ID", "OSType", "maxMemory", "maxVcpus", "isActive",
               "isPersistent", "isUpdated", "autostart", "hasManagedSaveImage", "state",
               "controlInfo", "jobInfo", "diskErrors", "snapshotNum", "snapshotListNames",
               "listAllSnapshots", "hasCurrentSnapshot", "snapshotCurrent", "listAllCheckpoints",
               "vcpusFlags", "emulatorPinInfo", "numaParameters", "memoryParameters",
               "blkioParameters", "schedulerType", "schedulerParameters", "hostname", "fsInfo",
               "getTime", "guestVcpus", "guestInfo", "launchSecurityInfo", "securityLabel",
               "securityLabelList", "getPerfEvents", "perfEvents", "messages", "migrateMaxDowntime",
               "migrateGetCompressionCache", "migrateGetMaxSpeed", "jobStats", "abortJob",
               "managedSaveRemove", "interfaceAddresses", "rename"):
    if hasattr(dom, method):
        args = {
            "hasManagedSaveImage": (0,), "interfaceAddresses": (0,), "rename": ("",),
            "guestInfo": (0, 0)
        }
        call(method, lambda: getattr(dom, method)(*args.get(method, ())))
for flags in range(16):
    call(f"XMLDesc {flags}", lambda: dom.XMLDesc(flags))
for target in ("vda", "vdb", "vdz", ""):
    call(f"blockInfo {target}", lambda: dom.blockInfo(target)[:1])
    call(f"blockStats {target}", lambda: dom.blockStats(target), kind)
    call(f"blockJobInfo {target}", lambda: dom.blockJobInfo(target, 0))
    call(f"blockIoTune {target}", lambda: dom.blockIoTune(target, 0))
    call(f"blockJobAbort {target}", lambda: dom.blockJobAbort(target, 0))
    call(f"blockPeek {target}", lambda: len(dom.blockPeek(target, 0, 512, 0)))
call("memoryStats", dom.memoryStats, kind)
call("getCPUStats", lambda: dom.getCPUStats(True), kind)
call("info", dom.info, kind)
call("interfaceStats", lambda: dom.interfaceStats("vnet0"))
for xml in ("<disk/>", "<interface type='user'/>", "nonsense"):
    for flags in (0, 1, 2):
        call(f"attachDeviceFlags {xml} {flags}", lambda: dom.attachDeviceFlags(xml, flags))
        call(f"detachDeviceFlags {xml} {flags}", lambda: dom.detachDeviceFlags(xml, flags))
for command in ("query-status", "query-name", "query-migrate-capabilities", "nonsense"):
    call(f"qemuMonitorCommand {command}",
         lambda: json.loads(
             libvirt_qemu.qemuMonitorCommand(dom, f'{{"execute":"{command}"}}', 0)).keys(),
         list)
call("create", dom.create)
call("suspend", dom.suspend)
call("suspend again", dom.suspend)
call("state", dom.state)
call("resume", dom.resume)
call("resume again", dom.resume)
call("setAutostart", lambda: dom.setAutostart(1))
call("autostart", dom.autostart)
call("setMetadata", lambda: dom.setMetadata(0, "described", None, None, 3))
call("metadata", lambda: dom.metadata(0, None, 0))
call("migrateToURI", lambda: dom.migrateToURI("nonsense", 0, None, 0))

# Snapshots that are refused: invalid combinations of flags, and invalid XML.
wrong = "<domainsnapshot><name>a/b</name></domainsnapshot>"
for bits in itertools.chain(itertools.combinations(range(10), 1),
                            itertools.combinations(range(10), 2), [(11,), (31,)]):
    flags = sum(1 << bit for bit in bits)
    call(f"snapshotCreateXML {flags:#x}", lambda: dom.snapshotCreateXML(wrong, flags))
memory = f"<memory snapshot='external' file='{directory}/same.mem'/>"
for xml in ("", "nonsense", "<domainsnapshot/>", f"<domainsnapshot>{memory}</domainsnapshot>",
            "<domainsnapshot><disks><disk name='vdz'/></disks></domainsnapshot>"):
    for flags in (0x0, 0x8, 0x80):
        if "nonsense" in xml or not xml or "vdz" in xml:
            call(f"snapshotCreateXML {xml} {flags:#x}", lambda: dom.snapshotCreateXML(xml, flags))
    call(f"snapshotCreateXML {xml} quiesce", lambda: dom.snapshotCreateXML(xml, 0x50))
# Snapshots that are taken.
call("disks",
     lambda: dom.snapshotCreateXML("<domainsnapshot><name>disks</name></domainsnapshot>", 0x10))
call(
    "plain", lambda: dom.snapshotCreateXML(
        f"<domainsnapshot><name>plain</name>{memory}</domainsnapshot>", 0))
call("live", lambda: dom.snapshotCreateXML(
    f"<domainsnapshot><name>live</name>{memory.replace('same', 'live')}</domainsnapshot>", 0x100))
call("twice",
     lambda: dom.snapshotCreateXML("<domainsnapshot><name>disks</name></domainsnapshot>", 0x10))
for flags in (0, 1, 2, 1 << 10):
    call(f"snapshotNum {flags}", lambda: dom.snapshotNum(flags))
    call(f"listAllSnapshots {flags}", lambda: dom.listAllSnapshots(flags))
for key in ("disks", "plain", "live", "none"):
    call(f"snapshotLookupByName {key}", lambda: dom.snapshotLookupByName(key))
    for method in ("getParent", "numChildren", "listAllChildren", "isCurrent", "hasMetadata"):
        call(f"{method} {key}", lambda: getattr(dom.snapshotLookupByName(key), method)())
for flags in (3, 16, 1 << 20):
    call(f"revertToSnapshot disks {flags}",
         lambda: dom.revertToSnapshot(dom.snapshotLookupByName("disks"), flags))
for flags in (5, 16, 1 << 20):
    call(f"delete disks {flags}", lambda: dom.snapshotLookupByName("disks").delete(flags))
call("delete live 2", lambda: dom.snapshotLookupByName("live").delete(2))
call("delete plain 2", lambda: dom.snapshotLookupByName("plain").delete(2))
call("delete disks 2", lambda: dom.snapshotLookupByName("disks").delete(2))
call("listAllSnapshots", dom.listAllSnapshots)
call("destroy", dom.destroy)
call("destroy again", dom.destroy)
call("state", dom.state)
call("suspend off", dom.suspend)
call("undefine", lambda: dom.undefineFlags(2))
call("listAllDomains", conn.listAllDomains)
assert count >= 200, count
