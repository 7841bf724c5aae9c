// SPDX-License-Identifier: LGPL-2.1-or-later

//! Writes the Rust side's prototypes in C, for the C compiler to compare with those of the headers:
//! a second declaration of a function, a type or a variable that differs from the first is an
//! error.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use syn::ext::IdentExt;
use syn::parse::ParseStream;
use syn::punctuated::Punctuated;
use syn::{Expr, Fields, GenericArgument, GenericParam, Ident, Item, ItemFn, ItemStruct, LitStr};
use syn::{PathArguments, ReturnType, Stmt, Token, Type, braced, parenthesized};

use crate::sources::{given_to, parse};

/// The files that declare functions of libvirt's headers.
pub const DECLARING: [&str; 2] = ["src/libvirt/table.rs", "preload/src/libvirt.rs"];

/// The file with libinstantsnap-preload.so's functions, which replace libvirt's.
pub const PRELOADED: &str = "preload/src/lib.rs";

/// The type parameters of a Rust type, with the types that they stand for.
type Names = BTreeMap<String, Type>;

/// A function: its name, its arguments, and its result.
type Function = (String, Vec<Type>, ReturnType);

/// The declarations in the sources.
#[derive(Default)]
pub struct Prototypes {
    /// The functions that C calls.
    exported: Vec<Function>,
    /// The functions of libvirt's: those that the libraries find at run time, and those that
    /// libinstantsnap-preload.so exports too.
    of_others: Vec<Function>,
    /// The structures that C and Rust share.
    structures: Vec<ItemStruct>,
    /// The types of callbacks.
    callbacks: Vec<(String, Type)>,
    /// The types that are pointers in the ABI: their parameters, and the pointer.
    transparent: BTreeMap<String, (Vec<String>, Type)>,
}

impl Prototypes {
    /// Reads the sources.
    pub fn read() -> Result<Prototypes, String> {
        let mut all = Prototypes::default();
        let folder =
            fs::read_dir("src/ffi").map_err(|error| format!("cannot list src/ffi: {error}"))?;
        let mut files: Vec<_> = folder.flatten().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
        files.sort();
        files.push("src/pointers.rs".into());
        for file in &files {
            all.read_file(file)?;
        }
        for file in DECLARING.map(Path::new).into_iter().filter(|file| file.exists()) {
            all.of_others.extend(given_to("symbols", file, &parse(file)?.items, symbols)?);
        }
        if Path::new(PRELOADED).exists() {
            let mut preloaded = Prototypes::default();
            preloaded.read_file(Path::new(PRELOADED))?;
            all.of_others.extend(preloaded.exported);
        }
        let abi = Path::new("src/ffi/abi.rs");
        all.structures = given_to("structures", abi, &parse(abi)?.items, structures)?;
        Ok(all)
    }

    fn read_file(&mut self, file: &Path) -> Result<(), String> {
        for item in parse(file)?.items {
            match item {
                Item::Fn(function) if is_c(&function) => {
                    let name = function.sig.ident.to_string();
                    if !begins_with_boundary(&function) {
                        return Err(format!(
                            "{}: {name}() does not begin with boundary()",
                            file.display()
                        ));
                    }
                    let arguments =
                        function.sig.inputs.into_iter().filter_map(|argument| match argument {
                            syn::FnArg::Typed(argument) => Some(*argument.ty),
                            syn::FnArg::Receiver(_) => None,
                        });
                    self.exported.push((name, arguments.collect(), function.sig.output));
                }
                Item::Struct(found) if is_transparent(&found) => {
                    let parameters =
                        found.generics.params.iter().filter_map(|parameter| match parameter {
                            GenericParam::Type(parameter) => Some(parameter.ident.to_string()),
                            _ => None,
                        });
                    let Fields::Unnamed(fields) = found.fields else { continue };
                    let Some(field) = fields.unnamed.into_iter().next() else { continue };
                    self.transparent
                        .insert(found.ident.to_string(), (parameters.collect(), field.ty));
                }
                Item::Type(found)
                    if file.ends_with("abi.rs")
                        && !matches!(&*found.ty, Type::Path(path) if path.path.is_ident("c_void")) =>
                {
                    self.callbacks.push((found.ident.to_string(), *found.ty));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A function of the header's, in bindgen's output, that is not exported.
    pub fn missing(&self, bindings: &str) -> Option<String> {
        let ours: BTreeSet<_> = self.exported.iter().map(|(name, ..)| name.as_str()).collect();
        // Without rustfmt, the output is one line.
        let declared = bindings
            .split("pub fn ")
            .skip(1)
            .filter_map(|rest| rest.split('(').next())
            .map(str::trim);
        let mut declared = declared
            .filter(|name| name.starts_with("instantsnap_") || name.starts_with("qemuSnapshot"));
        declared.find(|name| !ours.contains(name)).map(str::to_owned)
    }

    /// All declarations in C.
    pub fn in_c(&self) -> String {
        let mut c = String::new();
        let mut line = |text: String| writeln!(c, "{text}").expect("a string can grow");
        for (name, kind) in &self.callbacks {
            line(format!("typedef {};", self.declare(kind, name, false, &Names::new())));
        }
        for structure in &self.structures {
            line(self.layout(structure));
        }
        let (with_libvirt, alone): (Vec<_>, Vec<_>) =
            self.exported.iter().partition(|(name, ..)| name.starts_with("qemuSnapshot"));
        alone.into_iter().for_each(|function| line(self.prototype(function)));
        line("#ifdef WITH_LIBVIRT".into());
        with_libvirt
            .into_iter()
            .chain(&self.of_others)
            .for_each(|function| line(self.prototype(function)));
        line("#endif".into());
        c
    }

    /// Assertions that a structure has the same fields, of the same types, at the same offsets, and
    /// no others. They compare it with a twin, which C lays out as Rust lays out a `repr(C)`
    /// structure.
    fn layout(&self, structure: &ItemStruct) -> String {
        let name = &structure.ident;
        let fields = structure.fields.iter().map(|field| {
            let name = field.ident.as_ref().map(IdentExt::unraw).expect("a field has a name");
            (name.to_string(), &field.ty)
        });
        let (mut twin, mut checks) = (String::new(), String::new());
        for (field, kind) in fields {
            let variable = format!("check_{name}_{field}");
            let declare = |declarator| self.declare(kind, declarator, false, &Names::new());
            twin += &format!("{}; ", declare(&field));
            checks += &format!(
                "_Static_assert(offsetof({name}, {field}) == offsetof(struct rust_{name}, {field}), \
                 \"{name}.{field} has another offset in Rust\");\n\
                 extern __typeof__((({name} *) 0)->{field}) {variable};\n\
                 extern {};\n",
                declare(&variable)
            );
        }
        format!(
            "struct rust_{name} {{ {twin}}};\n{checks}\
             _Static_assert(sizeof({name}) == sizeof(struct rust_{name}), \
             \"{name} has another size in Rust\");"
        )
    }

    /// Declares a function. The assertion fails to compile if the header does not declare it.
    fn prototype(&self, (name, arguments, result): &Function) -> String {
        let declared = self.function(name, arguments, result, &Names::new());
        format!("_Static_assert(sizeof(&{name}) != 0, \"\");\n{declared};")
    }

    fn function(
        &self,
        name: &str,
        arguments: &[Type],
        result: &ReturnType,
        names: &Names,
    ) -> String {
        let arguments: Vec<_> =
            arguments.iter().map(|argument| self.declare(argument, "", false, names)).collect();
        let arguments = if arguments.is_empty() { "void".into() } else { arguments.join(", ") };
        let declarator = format!("{name}({arguments})");
        match result {
            ReturnType::Default => format!("void {declarator}"),
            ReturnType::Type(_, result) => self.declare(result, &declarator, false, names),
        }
    }

    /// The declaration of a variable or function of this type in C.
    fn declare(&self, kind: &Type, declarator: &str, is_const: bool, names: &Names) -> String {
        let qualifier = if is_const { "const " } else { "" };
        let pointer = format!("*{qualifier}{declarator}");
        match kind {
            Type::Ptr(found) => self.declare(
                &found.elem,
                &pointer,
                matches!(found.mutability, syn::PointerMutability::Const(_)),
                names,
            ),
            // A reference is to an object of libvirt's, or to a result: neither is const in C.
            Type::Reference(found) => self.declare(&found.elem, &pointer, false, names),
            Type::FnPtr(found) => {
                let arguments: Vec<_> =
                    found.inputs.iter().map(|argument| argument.ty.clone()).collect();
                self.function(&format!("({pointer})"), &arguments, &found.output, names)
            }
            Type::Path(found) => {
                let last = found.path.segments.last().expect("a path has an end");
                let name = last.ident.to_string();
                let arguments: Vec<_> = match &last.arguments {
                    PathArguments::AngleBracketed(found) => found.args.iter().collect(),
                    _ => Vec::new(),
                };
                let arguments = arguments.into_iter().filter_map(|argument| match argument {
                    GenericArgument::Type(kind) => Some(substitute(kind, names)),
                    _ => None,
                });
                let mut arguments = arguments.collect::<Vec<_>>().into_iter();
                if let Some(kind) = names.get(&name) {
                    return self.declare(kind, declarator, is_const, &Names::new());
                }
                if let Some((parameters, kind)) = self.transparent.get(&name) {
                    let names = parameters.iter().cloned().zip(arguments).collect();
                    return self.declare(kind, declarator, is_const, &names);
                }
                match (name.as_str(), arguments.next()) {
                    ("Option", Some(kind)) => self.declare(&kind, declarator, is_const, names),
                    ("NonNull", Some(kind)) => self.declare(&kind, &pointer, false, names),
                    _ => format!("{qualifier}{} {declarator}", base(&name)),
                }
            }
            _ => panic!("a type that does not exist in C, in a declaration of {declarator}"),
        }
    }
}

/// The type argument, or, if it is a parameter of the outer type, the type that this stands for.
fn substitute(kind: &Type, names: &Names) -> Type {
    match kind {
        Type::Path(found) => {
            found.path.get_ident().and_then(|name| names.get(&name.to_string())).unwrap_or(kind)
        }
        _ => kind,
    }
    .clone()
}

/// The name in C of a type that is neither a pointer nor a function.
fn base(name: &str) -> &str {
    match name {
        "c_void" => "void",
        "c_char" => "char",
        "c_int" => "int",
        "c_uint" => "unsigned int",
        "c_ulong" => "unsigned long",
        "c_ulonglong" => "unsigned long long",
        "i32" => "int32_t",
        "u32" => "uint32_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        "virConnect" => "struct _virConnect",
        "virDomain" => "struct _virDomain",
        "virDomainSnapshot" => "struct _virDomainSnapshot",
        other => other,
    }
}

/// Whether C can call the function by its name.
fn is_c(function: &ItemFn) -> bool {
    function.sig.abi.is_some()
        && function.attrs.iter().any(|attribute| attribute.path().is_ident("unsafe"))
}

fn is_transparent(found: &ItemStruct) -> bool {
    let is = |attribute: &syn::Attribute| {
        attribute.path().is_ident("repr")
            && attribute.parse_args::<Ident>().is_ok_and(|kind| kind == "transparent")
    };
    found.attrs.iter().any(is)
}

/// Whether a function's whole body is a call of `boundary`.
fn begins_with_boundary(function: &ItemFn) -> bool {
    let [Stmt::Expr(Expr::Call(call), _)] = function.block.stmts.as_slice() else { return false };
    matches!(&*call.func, Expr::Path(path) if path.path.is_ident("boundary"))
}

/// The functions in a `symbols!`, except for the optional ones, which no header has.
fn symbols(input: ParseStream) -> syn::Result<Vec<Function>> {
    input.call(syn::Attribute::parse_outer)?;
    input.parse::<syn::Visibility>()?;
    input.parse::<Token![struct]>()?;
    input.parse::<Ident>()?;
    input.parse::<Token![;]>()?;
    input.parse::<Token![unsafe]>()?;
    input.parse::<Token![extern]>()?;
    input.parse::<LitStr>()?;
    let list;
    braced!(list in input);
    let mut functions = Vec::new();
    while !list.is_empty() {
        if list.parse::<Option<Token![unsafe]>>()?.is_none() {
            list.parse::<Ident>()?;
        }
        list.parse::<Token![fn]>()?;
        let name = list.parse::<Ident>()?.to_string();
        let arguments;
        parenthesized!(arguments in list);
        let arguments = Punctuated::<Type, Token![,]>::parse_terminated(&arguments)?;
        functions.push((name, arguments.into_iter().collect(), list.parse()?));
        list.parse::<Token![;]>()?;
    }
    input.step(|optional| {
        let mut rest = *optional;
        while let Some((_, next)) = rest.token_tree() {
            rest = next;
        }
        Ok(((), rest))
    })?;
    Ok(functions)
}

/// The structures in a `structures!`.
fn structures(input: ParseStream) -> syn::Result<Vec<ItemStruct>> {
    let mut structures = Vec::new();
    while !input.is_empty() {
        structures.push(input.parse()?);
    }
    Ok(structures)
}
